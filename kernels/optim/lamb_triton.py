"""LAMB on GPUs: moments and norms, the length of each tensor's step, the weights."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_kernels.sources.optim.pieces_triton import (
    COPY,
    FIRST,
    GRAD,
    NUMEL,
    PARAM,
    ROW,
    SCALES,
    SHARED,
    SIGN,
    STATE,
    column,
    narrowed,
    number,
    row_of,
)


@triton.jit
def lamb_change(weight, first, second, table, row):
    """Adam's direction with weight decay."""
    denom = tl.sqrt_rn(second) * number(table, row + SCALES + 1) + number(table, 3)
    return tl.div_rn(first * number(table, row + SCALES), denom) + weight * number(table, 4)


@triton.jit(do_not_specialize=["count"])
def lamb_measure_kernel(
    table,
    coef,
    count,
    norms,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New moments of a block, and its two sums of squares, in double."""
    block = tl.program_id(0)
    row = row_of(table, count, block)
    at = (block - tl.load(table + row + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(table + row + NUMEL)
    weight = tl.load(column(table, row + PARAM, P, False) + at, inside, 0.0).to(tl.float32)
    grad = tl.load(column(table, row + GRAD, G, False) + at, inside, 0.0).to(tl.float32)
    grad = grad * (tl.load(coef) * number(table, SIGN))
    firsts = column(table, row + STATE, S, False) + at
    seconds = column(table, row + STATE + 1, S, False) + at
    first = tl.load(firsts, inside, 0.0).to(tl.float32)
    second = tl.load(seconds, inside, 0.0).to(tl.float32)
    first = narrowed(first + (grad - first) * number(table, 0), table, 1, S, BY_CHANCE)
    second = second * number(table, 1) + (grad * grad) * number(table, 2)
    second = narrowed(second, table, 2, S, BY_CHANCE)
    tl.store(firsts, first, inside)
    tl.store(seconds, second, inside)
    change = lamb_change(weight, first.to(tl.float32), second.to(tl.float32), table, row)
    wide_weight, wide_change = weight.to(tl.float64), tl.where(inside, change, 0.0).to(tl.float64)
    tl.store(norms + 2 * block, tl.sum(wide_weight * wide_weight))
    tl.store(norms + 2 * block + 1, tl.sum(wide_change * wide_change))


@triton.jit
def lamb_length_kernel(table, norms, lengths, numbers, blocks, BLOCK: tl.constexpr):
    """lr times the trust ratio of one tensor: its blocks' sums, in a fixed order."""
    tensor = tl.program_id(0)
    row = SHARED + tensor * ROW
    first = tl.load(table + row + FIRST)
    end = first + (tl.load(table + row + NUMEL) + (BLOCK - 1)) // BLOCK
    weights = tl.zeros([BLOCK], tl.float64)
    changes = tl.zeros([BLOCK], tl.float64)
    begin = first
    while begin < end:
        at = begin + tl.arange(0, BLOCK)
        weights += tl.load(norms + 2 * at, at < end, 0.0)
        changes += tl.load(norms + 2 * at + 1, at < end, 0.0)
        begin += BLOCK
    weight, change = tl.sum(weights), tl.sum(changes)
    ratio = tl.sqrt(weight) / tl.sqrt(tl.where(change > 0, change, 1.0))
    ratio = tl.minimum(tl.maximum(ratio, tl.load(numbers + 1)), tl.load(numbers + 2))
    ratio = tl.where((weight > 0) & (change > 0), ratio, 1.0)
    tl.store(lengths + tensor, (ratio * tl.load(numbers)).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def lamb_apply_kernel(
    table,
    lengths,
    count,
    P: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The change of a block once more, from its moments, and its weights less the step."""
    block = tl.program_id(0)
    row = row_of(table, count, block)
    at = (block - tl.load(table + row + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(table + row + NUMEL)
    params = column(table, row + PARAM, P, False) + at
    weight = tl.load(params, inside, 0.0).to(tl.float32)
    first = tl.load(column(table, row + STATE, S, False) + at, inside, 0.0).to(tl.float32)
    second = tl.load(column(table, row + STATE + 1, S, False) + at, inside, 0.0).to(tl.float32)
    weight -= lamb_change(weight, first, second, table, row) * tl.load(lengths + (row - SHARED) // ROW)
    tl.store(params, narrowed(weight, table, 0, P, BY_CHANCE), inside)
    if C is not None:
        tl.store(column(table, row + COPY, C, False) + at, narrowed(weight, table, 0, C, False), inside)
