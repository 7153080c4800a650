"""RMSNorm and LayerNorm on GPUs: a row in a program's registers; the backward adds up rows per program."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops import norm as op
from ds_kernels.sources.common.gpu import rounded

MOST = 16384  # elements of a row; the reference takes longer ones


@triton.jit
def norm_rows(
    x, residual, weight, bias, y, total, mean, rstd, cols, eps, CENTER: tl.constexpr, RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, forward."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < cols
    v = tl.load(x + row * cols + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + row * cols + at, mask=inside, other=0.0).to(tl.float32)
        both = rounded(v, total.dtype.element_ty)
        tl.store(total + row * cols + at, both, mask=inside)
        v = both.to(tl.float32)
    if CENTER:
        middle = tl.sum(v, 0) / cols
        tl.store(mean + row, middle)
        v = tl.where(inside, v - middle, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / cols + eps)
    tl.store(rstd + row, scale)
    v *= scale
    if WEIGHT:
        v *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + at, rounded(v, y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_rows(
    dy, dtotal, x, weight, mean, rstd, dx, sums, rows, cols, CENTER: tl.constexpr, TOTAL: tl.constexpr,
    WEIGHT: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every n-th row, backward; their parts of dweight and dbias go to the program's two rows of `sums`."""
    first = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < cols
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    for number in range(first, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        up = tl.load(dy + row * cols + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + row * cols + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        if CENTER:
            v = tl.where(inside, v - tl.load(mean + row), 0.0)
        v *= scale
        g = up * w
        slope = tl.sum(g * v, 0) / cols
        out = g
        if CENTER:
            out -= tl.sum(g, 0) / cols
        out = (out - v * slope) * scale
        if TOTAL:
            out += tl.load(dtotal + row * cols + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * cols + at, rounded(out, dx.dtype.element_ty), mask=inside)
        if SUM:
            dweight += up * v
            dbias += up
    if SUM:
        mine = sums + tl.cast(first, tl.int64) * 2 * cols
        tl.store(mine + at, dweight, mask=inside)
        tl.store(mine + cols + at, dbias, mask=inside)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ds::norm."""
    y, total, mean, rstd = op.fake(x, residual, weight, bias, eps=eps, center=center)
    if x.dtype == torch.float64 or x.shape[-1] > MOST:
        return op.reference(x, residual, weight, bias, eps=eps, center=center)
    if x.numel() == 0:
        return y, total, mean, rstd
    flat, block = x.contiguous(), triton.next_power_of_2(x.shape[-1])
    others = [flat if t is None else t.contiguous() for t in (residual, weight, bias)]
    norm_rows[(x.numel() // x.shape[-1],)](
        flat, *others, y, total, mean, rstd, x.shape[-1], eps, CENTER=center, RESIDUAL=residual is not None,
        WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return y, total, mean, rstd


def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """ds::norm_backward."""
    dx, dweight, dbias = op.fake_backward(dy, dtotal, x, weight, mean, rstd, **how)
    cols, want = x.shape[-1], how["want_weight"] or how["want_bias"]
    if x.dtype == torch.float64 or cols > MOST:
        return op.reference_backward(dy, dtotal, x, weight, mean, rstd, **how)
    rows, block = x.numel() // cols, triton.next_power_of_2(cols)
    programs = min(rows, _programs(x.device))
    sums = rstd.new_empty(programs if want else 0, 2, cols)
    if rows:
        flat = x.contiguous()
        others = [flat if t is None else t.contiguous() for t in (dtotal, weight)]
        norm_backward_rows[(programs,)](
            dy.contiguous(), others[0], flat, others[1], mean.contiguous(), rstd.contiguous(), dx, sums, rows,
            cols, CENTER=how["center"], TOTAL=dtotal is not None, WEIGHT=weight is not None, SUM=want,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    found = sums.sum(0)
    return dx, found[0] if how["want_weight"] else dweight, found[1].clone() if how["want_bias"] else dbias


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _programs(device: torch.device) -> int:
    """A few for each multiprocessor: the order of sums depends on the kind of GPU, not on the call."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _variant(dtype: str, weight: str, center: bool, backward: bool, block: int) -> Variant:
    if backward:
        signature = dict.fromkeys(("dy", "dtotal", "x", "dx"), f"*{dtype}") | {"weight": f"*{weight}"}
        signature |= dict.fromkeys(("mean", "rstd", "sums"), "*fp32") | dict.fromkeys(("rows", "cols"), "i32")
        constants = {"CENTER": center, "TOTAL": True, "WEIGHT": True, "SUM": True, "BLOCK": block}
        return Variant(norm_backward_rows, signature, constants, warps=_warps(block))
    signature = dict.fromkeys(("x", "residual", "y", "total"), f"*{dtype}")
    signature |= dict.fromkeys(("weight", "bias"), f"*{weight}") | dict.fromkeys(("mean", "rstd"), "*fp32")
    signature |= {"cols": "i32", "eps": "fp32"}
    constants = {"CENTER": center, "RESIDUAL": True, "WEIGHT": True, "BIAS": center, "BLOCK": block}
    return Variant(norm_rows, signature, constants, warps=_warps(block))


VARIANTS = [
    *(
        _variant("bf16", "bf16", center, backward, 8192)
        for center, backward in product((False, True), repeat=2)
    ),
    *(
        _variant(dtype, "fp32", True, backward, 8192)
        for dtype, backward in product(("fp32", "fp16"), (False, True))
    ),
]
