"""What the optimizer kernels share: the table of addresses, and rounding to what keeps a value."""

from __future__ import annotations

import triton
import triton.language as tl

# The table: what all tensors share, then a row for each.
SHARED, ROW = tl.constexpr(16), tl.constexpr(12)
SIGN, SEEDS = tl.constexpr(6), tl.constexpr(7)  # after six constants of the rule
PARAM, GRAD, STATE, COPY, SAVED = (tl.constexpr(k) for k in (0, 1, 2, 4, 5))
NUMEL, FIRST, SCALES = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)


@triton.jit
def number(table, place):
    """A float that the table holds as its bits."""
    return tl.load(table + place).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_of(table, count, block):
    """Where the row of the tensor with this block starts: the last whose first block is not after it."""
    low, high = count * 0, count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + SHARED + middle * ROW + FIRST) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return SHARED + low * ROW


@triton.jit
def column(table, place, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table."""
    pointer = tl.load(table + place).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def narrowed(value, table, place: tl.constexpr, KIND: tl.constexpr, BY_CHANCE: tl.constexpr):
    """fp32 rounded to what keeps it: see ops/optim/lists.py. bf16 by hand: the interpreter's own cuts off."""
    if tl.bfloat16 == KIND:
        bits = value.to(tl.uint32, bitcast=True)
        if BY_CHANCE:
            h = bits ^ tl.load(table + SEEDS + place).to(tl.uint32)
            h = (h ^ (h >> 16)) * 0x7FEB352D
            h = (h ^ (h >> 15)) * 0x846CA68B
            added = (h ^ (h >> 16)) & 0xFFFF
        else:
            added = 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(value != value, (bits >> 16) | 0x40, (bits + added) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(KIND)
