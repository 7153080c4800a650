"""Scaled and masked softmax on GPUs: a row in the registers of a program, or a long one in blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops import softmax as op
from ds_kernels.sources.common.gpu import rounded

HELD = 16384  # elements of a row that registers hold; longer ones are read three times, backward twice
BLOCK = 4096  # of a longer row


@triton.jit
def _logits(
    x, mask, row, at, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Elements `at` of a row, -inf where they do not stay. MASK: 0 none, 1 bytes (not 0: stays), 2 added."""
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
    return tl.where(stays, v, -float("inf"))


@triton.jit
def _share(total):
    """1 / total; 0 for a row in which nothing stays."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def softmax_rows(
    x, mask, out, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, held."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = _logits(
        x, mask, row, at, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK, CAUSAL
    )  # fmt: skip
    most = tl.max(v, 0)
    e = tl.exp(v - tl.where(most == -float("inf"), 0.0, most))
    made = e * _share(tl.sum(e, 0))
    tl.store(out + row * cols + at, rounded(made, out.dtype.element_ty), mask=at < cols)


@triton.jit
def softmax_long_rows(
    x, mask, out, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row in blocks: its largest, its sum, its results."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = _logits(
            x, mask, row, at, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK, CAUSAL
        )  # fmt: skip
        largest = tl.maximum(largest, v)
    most = tl.max(largest, 0)
    most = tl.where(most == -float("inf"), 0.0, most)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = _logits(
            x, mask, row, at, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK, CAUSAL
        )  # fmt: skip
        sums += tl.exp(v - most)
    share = _share(tl.sum(sums, 0))
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = _logits(
            x, mask, row, at, middle, inner, cols, mask_outer, mask_middle, mask_inner, scale, MASK, CAUSAL
        )  # fmt: skip
        made = tl.exp(v - most) * share
        tl.store(out + row * cols + at, rounded(made, out.dtype.element_ty), mask=at < cols)


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


@triton.jit
def softmax_backward_long_rows(dy, y, dx, cols, scale, BLOCK: tl.constexpr):
    """One row in blocks: the sum of its products, its results."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        up = tl.load(dy + row * cols + at, mask=at < cols, other=0.0).to(tl.float32)
        sums += tl.load(y + row * cols + at, mask=at < cols, other=0.0).to(tl.float32) * up
    mean = tl.sum(sums, 0)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        up = tl.load(dy + row * cols + at, mask=at < cols, other=0.0).to(tl.float32)
        v = tl.load(y + row * cols + at, mask=at < cols, other=0.0).to(tl.float32)
        made = v * (up - mean) * scale
        tl.store(dx + row * cols + at, rounded(made, dx.dtype.element_ty), mask=at < cols)


def softmax(x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """ds::softmax."""
    out = op.fake(x, mask, scale=scale, causal=causal)
    if x.dtype == torch.float64:
        return op.reference(x, mask, scale=scale, causal=causal)
    if x.numel() == 0:
        return out
    _, middle, inner, cols = op.four_dims(x)
    run, block = _of_rows(softmax_rows, softmax_long_rows, cols)
    flat = x.contiguous()
    kind, rows, strides = 0, flat, [0, 0, 0]
    if mask is not None:
        view = op.mask_rows(mask, x)
        kind, strides = (1 if mask.dtype == torch.bool else 2), list(view.stride()[:3])
        rows = view.view(torch.uint8) if kind == 1 else view
    run[(x.numel() // cols,)](
        flat, rows, out, middle, inner, cols, *strides, scale, MASK=kind, CAUSAL=causal, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def softmax_backward(dy: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """ds::softmax_backward."""
    dx = op.fake_backward(dy, y, scale=scale)
    cols = y.shape[-1]
    if y.dtype == torch.float64:
        return op.reference_backward(dy, y, scale=scale)
    if y.numel():
        run, block = _of_rows(softmax_backward_rows, softmax_backward_long_rows, cols)
        grid = (y.numel() // cols,)
        run[grid](dy.contiguous(), y.contiguous(), dx, cols, scale, BLOCK=block, num_warps=_warps(block))
    return dx


def _of_rows(held: Any, long: Any, cols: int) -> tuple[Any, int]:
    """The kernel for rows of this length, and its block."""
    return (held, triton.next_power_of_2(cols)) if cols <= HELD else (long, BLOCK)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _variant(kernel: Any, dtype: str, mask: int) -> Variant:
    signature = {"x": f"*{dtype}", "mask": ("*fp32", "*u8", "*fp32")[mask], "out": f"*{dtype}"}
    signature |= dict.fromkeys(("middle", "inner", "cols"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(("mask_outer", "mask_middle", "mask_inner"), "i64")
    return Variant(kernel, signature, {"MASK": mask, "CAUSAL": mask != 1, "BLOCK": 4096}, warps=8)


def _backward_variant(kernel: Any, dtype: str) -> Variant:
    signature = dict.fromkeys(("dy", "y", "dx"), f"*{dtype}") | {"cols": "i32", "scale": "fp32"}
    return Variant(kernel, signature, {"BLOCK": 4096}, warps=8)


VARIANTS = [
    *(_variant(softmax_rows, *which) for which in (("fp32", 0), ("bf16", 1), ("fp16", 2))),
    *(_backward_variant(softmax_backward_rows, dtype) for dtype in ("fp32", "bf16", "fp16")),
    *(_variant(softmax_long_rows, *which) for which in (("fp32", 1), ("bf16", 0), ("bf16", 2))),
    _backward_variant(softmax_backward_long_rows, "bf16"),
]
