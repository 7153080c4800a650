"""Sums of quantised chunks: the inner step of a reduce-scatter that sends few bits (ZeRO++'s qgZ)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code, written
from ds_kernels.ops.quant import (
    Blocks,
    Call,
    FormatName,
    Parts,
    allocate_blocks,
    blocks_call,
    check_parts,
    check_rounding,
    stochastic,
)
from ds_kernels.ops.quant_formats import Format, Rounding, decode, encode
from ds_kernels.ops.rows import give_back, read_rows
from ds_kernels.registry import Kernel, define, ready

SUM, REQUANTIZE = "sum_blocks_", "requantize_blocks_"


@torch.no_grad()
def sum_blocks(
    received: Blocks, *, factor: float = 1.0, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Sum k quantised chunks of n values, in order and in fp32, times `factor` (1 / k for a mean).

    Shapes: received of shape [k, n] -> out [n], fp32, bf16 or fp16, rounded once.
    """
    if out is None:
        out = torch.empty(received.shape[1:], dtype=dtype or received.dtype, device=received.codes.device)
    parts = (received.codes, received.scales, received.zeros)
    ready("quant", out.device)
    SUM_OP(*parts, out, received.format, received.block, factor)
    return out


@torch.no_grad()
def requantize_blocks(
    received: Blocks,
    *,
    factor: float = 1.0,
    format: FormatName | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    first_block: int = 0,
    out: Blocks | None = None,
) -> Blocks:
    """`sum_blocks`, quantised again in the same pass: what a hierarchical reduction sends on.

    Shapes: received of shape [k, n] -> out of shape [n], in the same blocks; `format` is that of `received`
    unless given, and that of `out` if that is given.
    The sum is exact to k fp32 roundings; quantising it again adds an error as `quantize_blocks` states.
    """
    if out is None:
        wanted = format or received.format
        device = received.codes.device
        out = allocate_blocks(
            received.shape[1:], dtype=received.dtype, format=wanted, block=received.block, device=device
        )
    if out.block != received.block:
        raise ValueError(
            f"{REQUANTIZE}: out has blocks of {out.block}, received of {received.block}; wanted: the same"
        )
    ready("quant", out.codes.device)
    REQUANTIZE_OP(
        received.codes, received.scales, received.zeros, out.codes, out.scales, out.zeros, received.shape[-1],
        format=received.format, out_format=out.format, block=received.block, factor=factor,
        stochastic=stochastic(REQUANTIZE, rounding), seed=seed, first_block=first_block,
    )  # fmt: skip
    return out


class _Settings(NamedTuple):
    form: Format  # of what is summed
    out_form: Format
    block: int
    factor: float
    rounding: Rounding


# Over rows: parts [k, ...]; values [1, n] or parts [1, ...]
SumRows = Callable[[Parts, Tensor, Format, int, float], None]
RequantizeRows = Callable[[Parts, Parts, int, _Settings], None]


def _check_chunks(op: str, parts: Parts, numel: int, format: str, block: int, factor: float) -> Format:
    check.tensor(op, "codes", parts.codes, dims=2)
    form = check_parts(op, parts, (parts.codes.shape[0], numel), format, block, parts.codes.device)
    check.number(op, "factor", factor, "finite", math.isfinite(factor))
    return form


def _check_sum(parts: Parts, out: Tensor, format: str, block: int, factor: float = 1.0) -> Format:
    check.tensor(SUM, "out", out, dtypes=DTYPES, shape=(None,), device=parts.codes.device)
    return _check_chunks(SUM, parts, out.shape[0], format, block, factor)


def _check_requantize(
    args: Sequence[Any], *, format: str, out_format: str, block: int, factor: float = 1.0, **how: Any
) -> tuple[Parts, Parts, int, _Settings]:
    parts, made, numel = Parts(*args[:3]), Parts(*args[3:6]), args[6]
    check.number(REQUANTIZE, "numel", numel, ">= 0", numel >= 0)
    form = _check_chunks(REQUANTIZE, parts, numel, format, block, factor)
    to = check_parts(REQUANTIZE, made, (numel,), out_format, block, parts.codes.device, "out_")
    return parts, made, numel, _Settings(form, to, block, factor, check_rounding(REQUANTIZE, to, **how))


def sum_fake(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, block: int,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """The op while torch traces: checks only."""
    _check_sum(Parts(codes, scales, zeros), out, format, block, factor)


def requantize_fake(*args: Any, **more: Any) -> None:
    """The op while torch traces: checks only."""
    _check_requantize(args, **more)


def sum_with(run: SumRows) -> Callable[..., None]:
    """The op over something that sums rows."""

    def sum_(
        codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, block: int,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        parts = Parts(codes, scales, zeros)
        form = _check_sum(parts, out, format, block, factor)
        check.apart(SUM, {**parts.named(), "out": out}, parts.named())
        if out.numel() and not out.is_meta:
            row = read_rows(out)
            run(parts.read(), row, form, block, factor)
            give_back(out, row)

    return sum_


def requantize_with(run: RequantizeRows) -> Callable[..., None]:
    """The op over something that sums and quantises rows."""

    def requantize(*args: Any, **more: Any) -> None:
        parts, made, numel, settings = _check_requantize(args, **more)
        check.apart(REQUANTIZE, {**parts.named(), **made.named("out_")}, parts.named())
        if numel and not parts.codes.is_meta:
            rows = made.read()
            run(parts.read(), rows, numel, settings)
            made.give_back(rows)

    return requantize


def _sum(parts: Parts, form: Format, block: int, numel: int, factor: float) -> Tensor:
    total = torch.zeros(numel, device=parts.codes.device)
    for values in decode(*parts, form, block, numel):
        total += values
    return (total * torch.tensor(factor, dtype=torch.float32, device=total.device))[None]


def sum_rows(parts: Parts, out: Tensor, form: Format, block: int, factor: float) -> None:
    """The reference."""
    out.copy_(_sum(parts, form, block, out.shape[1], factor))


def requantize_rows(parts: Parts, out: Parts, numel: int, to: _Settings) -> None:
    """The reference."""
    total = _sum(parts, to.form, to.block, numel, to.factor)
    out.set(encode(total, to.out_form, to.block, to.rounding))


def _sum_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_reduce_blocks", ctypes.POINTER(Call), ctypes.POINTER(Call))

    def run(parts: Parts, out: Tensor, form: Format, block: int, factor: float) -> None:
        call = blocks_call(None, parts, form, block, out.shape[1], library.isa_code)
        call.factor = factor
        to = Call(values=out.data_ptr(), rows=1, numel=out.shape[1], block=block, dtype=code(out.dtype))
        native(call, to)
        written([out])

    return sum_with(run)


def _requantize_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_reduce_blocks", ctypes.POINTER(Call), ctypes.POINTER(Call))

    def run(parts: Parts, out: Parts, numel: int, to: _Settings) -> None:
        call = blocks_call(None, parts, to.form, to.block, numel, library.isa_code)
        call.factor = to.factor
        native(call, blocks_call(None, out, to.out_form, to.block, numel, library.isa_code, to.rounding))
        out.written()

    return requantize_with(run)


SUM_OP = define(
    Kernel(
        name=SUM,
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, Tensor(a!) out, str format, int block, "
            "float factor=1.0) -> ()"
        ),
        family="quant",
        reference=sum_with(sum_rows),
        fake=sum_fake,
        native=_sum_native,
        triton=lambda module: sum_with(cast(SumRows, module.sum_chunks)),
    )
)
REQUANTIZE_OP = define(
    Kernel(
        name=REQUANTIZE,
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, Tensor(a!) out_codes, Tensor(b!) out_scales, "
            "Tensor(c!)? out_zeros, int numel, *, str format, str out_format, int block, float factor=1.0, "
            "bool stochastic=False, int seed=0, int first_block=0) -> ()"
        ),
        family="quant",
        reference=requantize_with(requantize_rows),
        fake=requantize_fake,
        native=_requantize_native,
        triton=lambda module: requantize_with(cast(RequantizeRows, module.requantize)),
    )
)
