"""Scaled and masked softmax on GPUs: a row in the registers of a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops import softmax as op
from ds_kernels.sources.common.gpu import rounded

MOST = 16384  # elements of a row; the reference takes longer ones


@triton.jit
def softmax_rows(
    x, mask, out, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. MASK: 0 none, 1 bytes, not 0 where something stays, 2 added."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    query, rest = row % inner, row // inner
    stays = at < cols
    v = tl.load(x + row * cols + at, mask=stays, other=0.0).to(tl.float32) * scale
    if MASK > 0:
        mine = mask + rest // middle * mask_outer + rest % middle * mask_middle + query * mask_inner
        if MASK == 1:
            stays &= tl.load(mine + at, mask=stays, other=0) != 0
        else:
            v += tl.load(mine + at, mask=stays, other=0.0)
    if CAUSAL:
        stays &= at <= cols - inner + query
    v = tl.where(stays, v, -float("inf"))
    most = tl.max(v, 0)
    e = tl.exp(v - tl.where(most == -float("inf"), 0.0, most))
    total = tl.sum(e, 0)
    share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(out + row * cols + at, rounded(e * share, out.dtype.element_ty), mask=at < cols)


@triton.jit
def softmax_backward_rows(dy, y, dx, cols, scale, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < cols
    up = tl.load(dy + row * cols + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(y + row * cols + at, mask=inside, other=0.0).to(tl.float32)
    made = v * (up - tl.sum(v * up, 0)) * scale
    tl.store(dx + row * cols + at, rounded(made, dx.dtype.element_ty), mask=inside)


def softmax(x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """ds::softmax."""
    out = op.fake(x, mask, scale=scale, causal=causal)
    if x.dtype == torch.float64 or x.shape[-1] > MOST:
        return op.reference(x, mask, scale=scale, causal=causal)
    if x.numel() == 0:
        return out
    _, middle, inner, cols = op.four_dims(x)
    block = triton.next_power_of_2(cols)
    flat = x.contiguous()
    kind, rows, strides = 0, flat, [0, 0, 0]
    if mask is not None:
        view = op.mask_rows(mask, x)
        kind, strides = (1 if mask.dtype == torch.bool else 2), list(view.stride()[:3])
        rows = view.view(torch.uint8) if kind == 1 else view
    softmax_rows[(x.numel() // cols,)](
        flat, rows, out, middle, inner, cols, *strides, scale, MASK=kind, CAUSAL=causal, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def softmax_backward(dy: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """ds::softmax_backward."""
    dx = op.fake_backward(dy, y, scale=scale)
    cols = y.shape[-1]
    if y.dtype == torch.float64 or cols > MOST:
        return op.reference_backward(dy, y, scale=scale)
    if y.numel():
        block = triton.next_power_of_2(cols)
        grid = (y.numel() // cols,)
        softmax_backward_rows[grid](
            dy.contiguous(), y.contiguous(), dx, cols, scale, BLOCK=block, num_warps=_warps(block)
        )
    return dx


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _variant(dtype: str, mask: int) -> Variant:
    signature = {"x": f"*{dtype}", "mask": ("*fp32", "*u8", "*fp32")[mask], "out": f"*{dtype}"}
    signature |= dict.fromkeys(("middle", "inner", "cols"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(("mask_outer", "mask_middle", "mask_inner"), "i64")
    return Variant(softmax_rows, signature, {"MASK": mask, "CAUSAL": mask != 1, "BLOCK": 4096}, warps=8)


def _backward_variant(dtype: str) -> Variant:
    signature = dict.fromkeys(("dy", "y", "dx"), f"*{dtype}") | {"cols": "i32", "scale": "fp32"}
    return Variant(softmax_backward_rows, signature, {"BLOCK": 4096}, warps=8)


VARIANTS = [
    *(_variant(*which) for which in (("fp32", 0), ("bf16", 1), ("fp16", 2))),
    *(_backward_variant(dtype) for dtype in ("fp32", "bf16", "fp16")),
]
