"""One bit per value with error feedback, and sums of buffers, on GPUs; no host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops.bits import block_sizes

TILE = 2048  # elements of a program
SLOTS = 4  # sources of one launch


@triton.jit
def _to(value, dtype: tl.constexpr):
    """Rounded to nearest even, by hand to bf16: the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, (bits >> 16) | 0x40)
        result = (rounded & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def pack_kernel(
    values, errors, signs, norms, values_stride, errors_stride, signs_stride, numel, block, pieces,
    FEEDBACK: tl.constexpr, SQUARES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A piece of a block: value + error to `errors`, its signs, and its part of the block's norm."""
    program = tl.program_id(0).to(tl.int64)
    piece, which = program % pieces, program // pieces
    blocks = (numel + block - 1) // block
    row, k = which // blocks, which % blocks
    byte = tl.arange(0, TILE // 8)
    inside = piece * TILE + byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    at = k * block + inside
    valid = (inside < block) & (at < numel)
    x = tl.load(values + row * values_stride + at, mask=valid, other=0.0).to(tl.float32)
    if FEEDBACK:
        x += tl.load(errors + row * errors_stride + at, mask=valid, other=0.0)
        tl.store(errors + row * errors_stride + at, x, mask=valid)
    bits = (valid & ~(x < 0)).to(tl.int32)
    whole = tl.sum(bits << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    some = tl.max(valid.to(tl.int32), 1) > 0
    tl.store(signs + row * signs_stride + (k * block + piece * TILE) // 8 + byte, whole, mask=some)
    wide = x.to(tl.float64)
    size = wide * wide if SQUARES else tl.abs(wide)
    tl.store(norms + program, tl.sum(tl.sum(size, 1), 0))


@triton.jit
def error_kernel(
    errors, scales, errors_stride, scales_stride, numel, block, tiles, TILE: tl.constexpr
):  # fmt: skip
    """errors -= scale * sign, where they hold value + error."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    at = program % tiles * TILE + tl.arange(0, TILE)
    scale = tl.load(scales + row * scales_stride + at // block, mask=at < numel, other=0.0)
    x = tl.load(errors + row * errors_stride + at, mask=at < numel, other=0.0)
    tl.store(errors + row * errors_stride + at, x - tl.where(x < 0, -scale, scale), mask=at < numel)


@triton.jit
def unpack_kernel(
    signs, scales, out, signs_stride, scales_stride, rows, numel, block, factor,
    ADD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out (+)= factor * sum over rows of scale * sign."""
    start = tl.program_id(0).to(tl.int64) * TILE
    byte = tl.arange(0, TILE // 8)
    at = start + byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    valid = at < numel
    there = start + byte * 8 < numel
    total = tl.zeros((TILE // 8, 8), tl.float32)
    for _ in range(rows):
        whole = tl.load(signs + start // 8 + byte, mask=there, other=0).to(tl.int32)
        scale = tl.load(scales + at // block, mask=valid, other=0.0)
        total += tl.where(((whole[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0, scale, -scale)
        signs += signs_stride
        scales += scales_stride
    total = total * factor
    if ADD:
        total = tl.load(out + at, mask=valid, other=0.0).to(tl.float32) + total
    tl.store(out + at, _to(total, out.dtype.element_ty), mask=valid)


@triton.jit
def sum_kernel(
    out, before, first, second, third, fourth, numel, factor,
    SUMMED: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`before`, if there is a sum so far, and up to four sources, in order."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    if SUMMED:
        total = tl.load(before + at, mask=at < numel, other=0.0)
    if COUNT > 0:
        total += tl.load(first + at, mask=at < numel, other=0.0).to(tl.float32)
    if COUNT > 1:
        total += tl.load(second + at, mask=at < numel, other=0.0).to(tl.float32)
    if COUNT > 2:
        total += tl.load(third + at, mask=at < numel, other=0.0).to(tl.float32)
    if COUNT > 3:
        total += tl.load(fourth + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(out + at, _to(total * factor, out.dtype.element_ty), mask=at < numel)


def pack(value: Tensor, error: Tensor | None, signs: Tensor, scales: Tensor, block: int, l2: bool) -> None:
    """Pack rows."""
    rows, numel = value.shape
    blocks, tile = triton.cdiv(numel, block), min(TILE, triton.next_power_of_2(block))
    pieces = triton.cdiv(min(block, numel), tile)
    errors = scales if error is None else error
    exact: dict[str, Any] = {"enable_fp_fusion": False}
    with torch.cuda.device_of(value):
        norms = torch.empty(rows * blocks * pieces, dtype=torch.float64, device=value.device)
        pack_kernel[(norms.numel(),)](
            value, errors, signs, norms,
            value.stride(0), errors.stride(0), signs.stride(0), numel, block, pieces,
            FEEDBACK=error is not None, SQUARES=l2, TILE=tile, **exact,
        )  # fmt: skip
        size = norms.view(rows, blocks, pieces).sum(-1) / block_sizes(numel, block, value.device)
        scales.copy_(size.sqrt() if l2 else size)
        if error is not None:
            tiles = triton.cdiv(numel, TILE)
            error_kernel[(rows * tiles,)](
                error, scales, error.stride(0), scales.stride(0), numel, block, tiles, TILE=TILE, **exact
            )


def unpack(signs: Tensor, scales: Tensor, out: Tensor, block: int, factor: float, accumulate: bool) -> None:
    """Unpack rows and add them."""
    with torch.cuda.device_of(out):
        unpack_kernel[(triton.cdiv(out.shape[1], TILE),)](
            signs, scales, out,
            signs.stride(0), scales.stride(0), signs.shape[0], out.shape[1], block, factor,
            ADD=accumulate, TILE=TILE, enable_fp_fusion=False,
        )  # fmt: skip


def sum_flat(out: Tensor, sources: list[Tensor], factor: float) -> None:
    """Sum contiguous tensors, four at a time."""
    numel, total = out.numel(), out
    groups = [sources[i : i + SLOTS] for i in range(0, len(sources), SLOTS)] or [[]]
    with torch.cuda.device_of(out):
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            before, total = total, out
            if not last:
                total = before if number else torch.empty(numel, dtype=torch.float32, device=out.device)
            slots = [*group, *[out] * (SLOTS - len(group))]
            sum_kernel[(triton.cdiv(numel, TILE),)](
                total, before, *slots, numel, factor if last else 1.0,
                SUMMED=number > 0, COUNT=len(group), TILE=TILE, enable_fp_fusion=False,
            )  # fmt: skip


def _variants() -> list[Variant]:
    names = ("values", "errors", "signs", "scales")
    whole = dict.fromkeys(
        (*(f"{n}_stride" for n in names), "numel", "block", "pieces", "tiles", "rows"), "i64"
    )
    shared = {
        **whole,
        "signs": "*u8",
        "scales": "*fp32",
        "errors": "*fp32",
        "norms": "*fp64",
        "before": "*fp32",
    }
    made = [Variant(error_kernel, shared, {"TILE": TILE})]
    for dtype in ("fp32", "bf16", "fp16"):
        pointer = dict.fromkeys(("values", "out", "first", "second", "third", "fourth"), f"*{dtype}")
        types = {**shared, **pointer, "factor": "fp32"}
        made += [
            Variant(pack_kernel, types, {"FEEDBACK": True, "SQUARES": False, "TILE": TILE}),
            Variant(unpack_kernel, types, {"ADD": True, "TILE": TILE}),
            Variant(sum_kernel, types, {"SUMMED": True, "COUNT": 4, "TILE": TILE}),
        ]
    return made


VARIANTS = _variants()
