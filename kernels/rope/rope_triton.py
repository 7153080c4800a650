"""Rotary position embedding on GPUs: a program for a few heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.sources.common.gpu import rounded

HEADS = 8


@triton.jit
def rotate(
    x, out, cos, sin, positions, tokens, heads, width, pairs, known, x_batch, x_token, x_head, out_batch,
    out_token, out_head, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COPY: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token; elements past the pairs are copied where `out` is other memory (COPY)."""
    place = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (i < pairs)
    position = tl.load(positions + place)
    valid = (position >= 0) & (position < known)
    c = tl.load(cos + position * pairs + i, mask=(i < pairs) & valid, other=float("nan"))
    s = tl.load(sin + position * pairs + i, mask=(i < pairs) & valid, other=0.0)
    if INVERSE:
        s = -s
    source = x + place // tokens * x_batch + place % tokens * x_token + head * x_head
    target = out + place // tokens * out_batch + place % tokens * out_token + head * out_head
    first = 2 * i if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + pairs
    a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + first, rounded(a * c - b * s, out.dtype.element_ty), mask=inside)
    tl.store(target + second, rounded(b * c + a * s, out.dtype.element_ty), mask=inside)
    if COPY:
        j = 2 * pairs + tl.arange(0, REST)[None, :]
        left = (head < heads) & (j < width)
        tl.store(target + j, tl.load(source + j, mask=left), mask=left)


def loop(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, inverse: bool
) -> None:
    """Over [batches, T, heads, D]; without fused multiply-adds, for the reference's bits."""
    if x.numel() == 0:
        return
    batches, tokens, heads, width = x.shape
    known, pairs = cos.shape
    rest = width - 2 * pairs
    rotate[(batches * tokens, triton.cdiv(heads, HEADS))](
        x, out, cos.contiguous(), sin.contiguous(), positions, tokens, heads, width, pairs, known,
        *x.stride()[:3], *out.stride()[:3], INTERLEAVED=interleaved, INVERSE=inverse,
        COPY=rest > 0 and x is not out, HEADS=HEADS, PAIRS=triton.next_power_of_2(max(1, pairs)),
        REST=triton.next_power_of_2(max(1, rest)), enable_fp_fusion=False,
    )  # fmt: skip


def _variant(dtype: str, interleaved: bool) -> Variant:
    signature = dict.fromkeys(("x", "out"), f"*{dtype}") | dict.fromkeys(("cos", "sin"), "*fp32")
    signature |= {"positions": "*i64"} | dict.fromkeys(("tokens", "heads", "width", "pairs", "known"), "i32")
    strides = ("x_batch", "x_token", "x_head", "out_batch", "out_token", "out_head")
    signature |= dict.fromkeys(strides, "i64")
    constants = {"INTERLEAVED": interleaved, "INVERSE": False, "COPY": True}
    return Variant(rotate, signature, constants | {"HEADS": HEADS, "PAIRS": 64, "REST": 64})


VARIANTS = [_variant(dtype, dtype == "bf16") for dtype in ("fp32", "bf16", "fp16")]
