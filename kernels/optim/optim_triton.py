"""Optimizer steps on GPUs: one launch for a list of tensors, whose addresses it finds in a table.

Products and sums are rounded on their own (no fused multiply-add: `enable_fp_fusion=False`), square root and
division are IEEE's, so the bits are those of the reference. The step waits for memory, which hides the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.native import written
from ds_kernels.ops.optim.elementwise import Call, run_reference, save
from ds_kernels.ops.optim.lamb import reference_one
from ds_kernels.ops.optim.lists import Lists
from ds_kernels.ops.optim.rules import LambHyper
from ds_kernels.sources.optim.lamb_triton import lamb_apply_kernel, lamb_length_kernel, lamb_measure_kernel
from ds_kernels.sources.optim.pieces_triton import (
    COPY,
    FIRST,
    GRAD,
    NUMEL,
    PARAM,
    SAVED,
    SCALES,
    SHARED,
    SIGN,
    STATE,
    column,
    narrowed,
    number,
    row_of,
)

BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def update(
    weight, grad, first, second, table, row, RULE: tl.constexpr, L2: tl.constexpr, NESTEROV: tl.constexpr
):
    """The rules of ops/optim/rules.py: Adam, Adagrad, Lion, SGD, SGD with momentum."""
    a, b, c = number(table, 0), number(table, 1), number(table, 2)
    if RULE == 0:
        d, decay = number(table, 3), number(table, 4)
        if L2:
            grad = grad + weight * decay
        else:
            weight = weight * decay
        first = first + (grad - first) * a
        second = second * b + (grad * grad) * c
        denom = tl.sqrt_rn(second) * number(table, row + SCALES + 1) + d
        weight = weight - tl.div_rn(first, denom) * number(table, row + SCALES)
    elif RULE == 1:
        if L2:
            grad = grad + weight * b
        first = first + grad * grad
        weight = weight - tl.div_rn(grad, tl.sqrt_rn(first) + a) * number(table, row + SCALES)
    elif RULE == 2:
        change = grad - first
        ahead = first + change * a
        first = first + change * b
        sign = tl.where(ahead > 0, 1.0, 0.0) - tl.where(ahead < 0, 1.0, 0.0)
        weight = weight * c - sign * number(table, 3)
    else:
        if L2:
            grad = grad + weight * a
        if RULE == 4:
            first = first * c + grad * number(table, row + SCALES)
            grad = grad + first * c if NESTEROV else first
        weight = weight - grad * b
    return weight, first, second


# -- element-wise steps ------------------------------------------------------------------------------------


@triton.jit
def step_block(
    table,
    row,
    at,
    inside,
    coef,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    L2: tl.constexpr,
    NESTEROV: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    SAVING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block; `inside` is None for a full one."""
    params = column(table, row + PARAM, P, ALIGNED) + at
    old = tl.load(params, inside)
    grad = tl.load(column(table, row + GRAD, G, ALIGNED) + at, inside).to(tl.float32) * coef
    weight = old.to(tl.float32)
    first, second = weight, weight
    if STATES > 0:
        firsts = column(table, row + STATE, S, ALIGNED) + at
        first_old = tl.load(firsts, inside)
        first = first_old.to(tl.float32)
    if STATES > 1:
        seconds = column(table, row + STATE + 1, S, ALIGNED) + at
        second_old = tl.load(seconds, inside)
        second = second_old.to(tl.float32)
    if SAVING:
        tl.store(column(table, row + SAVED, P, ALIGNED) + at, old, inside)
        if STATES > 0:
            tl.store(column(table, row + SAVED + 1, S, ALIGNED) + at, first_old, inside)
        if STATES > 1:
            tl.store(column(table, row + SAVED + 2, S, ALIGNED) + at, second_old, inside)
    weight, first, second = update(weight, grad, first, second, table, row, RULE, L2, NESTEROV)
    tl.store(params, narrowed(weight, table, 0, P, BY_CHANCE), inside)
    if STATES > 0:
        tl.store(firsts, narrowed(first, table, 1, S, BY_CHANCE), inside)
    if STATES > 1:
        tl.store(seconds, narrowed(second, table, 2, S, BY_CHANCE), inside)
    if C is not None:
        tl.store(column(table, row + COPY, C, ALIGNED) + at, narrowed(weight, table, 0, C, False), inside)


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    table,
    coef,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    L2: tl.constexpr,
    NESTEROV: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    SAVING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor."""
    block = tl.program_id(0)
    row = row_of(table, count, block)
    begin = (block - tl.load(table + row + FIRST)) * BLOCK
    numel = tl.load(table + row + NUMEL)
    at = begin + tl.arange(0, BLOCK)
    scale = tl.load(coef) * number(table, SIGN)
    if begin + BLOCK <= numel:  # without a mask, loads and stores are as wide as they can be
        step_block(
            table, row, at, None, scale, P, G, S, C, RULE, STATES, L2, NESTEROV, BY_CHANCE, SAVING, ALIGNED
        )  # fmt: skip
    else:
        step_block(
            table, row, at, at < numel, scale,
            P, G, S, C, RULE, STATES, L2, NESTEROV, BY_CHANCE, SAVING, ALIGNED,
        )  # fmt: skip


# -- launches ----------------------------------------------------------------------------------------------


def make_step(rule: type[Any]) -> Callable[..., None]:
    """The op of an element-wise rule."""

    def step(*args: Any, **settings: Any) -> None:
        call = Call.of(rule, args, settings)
        call.lists.check_apart()
        flat, rest = _parts(call)
        if rest.lists.params:
            run_reference(rest)
        blocks = _blocks(flat.lists)
        if blocks[-1]:
            _launch_step(flat, blocks)
            written([t for part in flat.lists.written() for t in part])

    return step


def lamb_step(*args: Any, **settings: Any) -> None:
    """The op of LAMB."""
    call = Call.of(LambHyper, args, settings)
    call.lists.check_apart()
    save(call.lists)
    flat, rest = _parts(call)
    for i in range(len(rest.lists.params)):
        reference_one(rest, i)
    blocks = _blocks(flat.lists)
    if blocks[-1]:
        _launch_lamb(flat, blocks)
        written([t for part in flat.lists.written() for t in part])


def _launch_step(call: Call, blocks: list[int]) -> None:
    lists, hyper = call.lists, call.hyper
    with torch.cuda.device_of(lists.params[0]):
        step_kernel[(blocks[-1],)](
            _table(call, blocks), _coef(call), len(lists.params),
            P=TYPES[lists.params[0].dtype], G=TYPES[lists.grads[0].dtype], S=_state_type(lists),
            C=TYPES[lists.copies[0].dtype] if lists.copies else None, RULE=hyper.code,
            STATES=len(lists.states),
            L2=bool(hyper.flags & 1), NESTEROV=bool(hyper.flags & 2), BY_CHANCE=call.seed is not None,
            SAVING=bool(lists.saved), ALIGNED=_aligned(lists), BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def _launch_lamb(call: Call, blocks: list[int]) -> None:
    lists, hyper = call.lists, call.hyper
    assert isinstance(hyper, LambHyper)
    device, count = lists.params[0].device, len(lists.params)
    table, chance = _table(call, blocks), call.seed is not None
    norms = torch.empty(2 * blocks[-1], dtype=torch.float64, device=device)
    lengths = torch.empty(count, device=device)
    numbers = _sent(torch.tensor([hyper.lr, hyper.min_coeff, hyper.max_coeff], dtype=torch.float64), device)
    kinds = {"P": TYPES[lists.params[0].dtype], "S": _state_type(lists), "BY_CHANCE": chance, "BLOCK": BLOCK}
    with torch.cuda.device_of(lists.params[0]):
        lamb_measure_kernel[(blocks[-1],)](
            table, _coef(call), count, norms, G=TYPES[lists.grads[0].dtype], **kinds, enable_fp_fusion=False
        )
        lamb_length_kernel[(count,)](table, norms, lengths, numbers, blocks[-1], BLOCK=BLOCK)
        copy = TYPES[lists.copies[0].dtype] if lists.copies else None
        lamb_apply_kernel[(blocks[-1],)](table, lengths, count, C=copy, **kinds, enable_fp_fusion=False)


def _parts(call: Call) -> tuple[Call, Call]:
    """What one index can walk, with states of one dtype; and what the reference has to do."""
    lists = call.lists
    if len({part[0].dtype for part in lists.states if part}) > 1:
        parts = lists.chosen([]), lists
    else:
        parts = lists.walkable()
    flat, rest = (Call(part, call.hyper, call.grad_coef, call.seed) for part in parts)
    return flat, rest


def _state_type(lists: Lists) -> Any:
    return TYPES[lists.states[0][0].dtype] if lists.states else tl.float32


def _blocks(lists: Lists) -> list[int]:
    """The number of blocks before each tensor, and of all."""
    return [0, *accumulate(-(-t.numel() // BLOCK) for t in lists.params)]


def _aligned(lists: Lists) -> bool:
    return all(t.data_ptr() % 16 == 0 for part in lists.every() for t in part)


def _coef(call: Call) -> Tensor:
    device = call.lists.params[0].device
    if call.grad_coef is None:
        return torch.ones(1, device=device)
    return call.grad_coef.to(device, torch.float32, non_blocking=True).reshape(1)


def _table(call: Call, blocks: list[int]) -> Tensor:
    """Constants, sign, seeds; then of each tensor addresses, length, first block, scales. Nothing waits."""
    lists = call.lists
    floats = [*call.constants(), -1.0 if call.hyper.maximize else 1.0]
    shared = [*_bits(floats), *call.all_seeds()]
    shared += [0] * (SHARED.value - len(shared))
    none = [0] * len(lists.params)
    states = [[t.data_ptr() for t in part] for part in lists.states]
    saved = [[t.data_ptr() for t in part] for part in lists.saved]
    scales = _bits(call.scales().tolist())
    columns = [
        [t.data_ptr() for t in lists.params], [t.data_ptr() for t in lists.grads],
        *states, *[none] * (2 - len(states)), [t.data_ptr() for t in lists.copies] or none,
        *saved, *[none] * (3 - len(saved)), [t.numel() for t in lists.params], blocks[:-1],
        scales[::2], scales[1::2],
    ]  # fmt: skip
    rows = torch.tensor(columns, dtype=torch.int64).t().reshape(-1)
    return _sent(torch.cat([torch.tensor(shared, dtype=torch.int64), rows]), lists.params[0].device)


def _bits(values: list[float]) -> list[int]:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()


def _sent(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


# -- compiled for GPUs that are not here ---------------------------------------------------------------------

F, B, H = tl.float32, tl.bfloat16, tl.float16
_KINDS = ((F, F, F, None, False), (F, B, F, B, False), (F, H, F, H, False), (B, B, B, None, True))
_RULES = ((0, 2), (1, 1), (2, 1), (3, 0), (4, 1))
_POINTERS = {"table": "*i64", "coef": "*fp32", "count": "i32"}

VARIANTS = [
    *(
        Variant(
            step_kernel,
            _POINTERS,
            {"P": p, "G": g, "S": s, "C": c, "RULE": rule, "STATES": states, "L2": rule != 2,
             "NESTEROV": False, "BY_CHANCE": chance, "SAVING": False, "ALIGNED": True, "BLOCK": BLOCK},
            fp_fusion=False,
        )
        for rule, states in _RULES for p, g, s, c, chance in (_KINDS if rule == 0 else _KINDS[1:2])
    ),
    *(
        Variant(
            lamb_measure_kernel, {**_POINTERS, "norms": "*fp64"},
            {"P": F, "G": g, "S": F, "BY_CHANCE": False, "BLOCK": BLOCK}, fp_fusion=False,
        )
        for g in (F, B)
    ),
    Variant(
        lamb_length_kernel,
        {"table": "*i64", "norms": "*fp64", "lengths": "*fp32", "numbers": "*fp64", "blocks": "i32"},
        {"BLOCK": BLOCK},
    ),
    Variant(
        lamb_apply_kernel, {"table": "*i64", "lengths": "*fp32", "count": "i32"},
        {"P": F, "S": F, "C": B, "BY_CHANCE": False, "BLOCK": BLOCK}, fp_fusion=False,
    ),
]  # fmt: skip
