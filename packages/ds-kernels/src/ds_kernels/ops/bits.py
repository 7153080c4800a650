"""One bit per value with error feedback, and sums of several such."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code, written
from ds_kernels.ops.rows import give_back, read_rows
from ds_kernels.registry import Kernel, define, ready

PACK, UNPACK = "pack_signs_", "unpack_signs_"


@dataclass(frozen=True)
class Signs:
    """A tensor of `shape` and `dtype` as its signs, and a magnitude for every `block` elements of a row.

    `signs` [..., bytes] uint8: element i is bit i % 8 of byte i // 8, 1 unless it is below 0; the bits after
    the last are 0. `scales` [..., blocks] fp32.
    """

    signs: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block: int


def allocate_signs(
    shape: torch.Size | tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    block: int | None = None,
    device: torch.device | None = None,
) -> Signs:
    """Memory for the signs of a tensor; `block` None is one scale for each row."""
    each = -(-max(shape[-1], 1) // 16) * 16 if block is None else block
    check.number("allocate_signs", "block", each, "a positive multiple of 16", each > 0 and each % 16 == 0)
    lead, numel = tuple(shape[:-1]), shape[-1]
    signs = torch.empty((*lead, -(-numel // 8)), dtype=torch.uint8, device=device)
    scales = torch.empty((*lead, -(-numel // each)), device=device)
    return Signs(signs, scales, torch.Size(shape), dtype, each)


@torch.no_grad()
def pack_signs_(
    value: Tensor,
    error: Tensor | None = None,
    *,
    block: int | None = None,
    norm: Literal["l1", "l2"] = "l1",
    out: Signs | None = None,
) -> Signs:
    """Keep of value + error the signs and one magnitude per block; what is lost becomes the new `error`.

    1-bit Adam (Tang et al. 2021, algorithm 1): c = value + error, scale = |c|_1 / n, error = c - scale *
    sign(c), so that what is sent adds up over steps to what was given, less the last error: nothing is lost
    for good. `norm` l2 takes |c|_2 / sqrt(n), as the reference system's collectives do; sign(0) is 1.
    Norms are summed in double. A NaN or infinity makes its block's scale, and all it decodes to, not finite.
    Shapes: value [..., n] fp32, bf16 or fp16, error like it in fp32; `block` None is one scale for each row.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"{PACK}: norm={norm!r}; wanted: 'l1' or 'l2'")
    if value.dim() == 0:
        check.refuse(PACK, "value", value, "at least 1 dimension")
    made = out or allocate_signs(value.shape, dtype=value.dtype, block=block, device=value.device)
    ready("bits", value.device)
    PACK_OP(value, error, made.signs, made.scales, made.block, norm == "l2")
    return made


@torch.no_grad()
def unpack_signs(
    packed: Signs,
    *,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Sum the scale * sign of k ranks, in order and in fp32, times `factor`; `accumulate` adds it to `out`.

    Shapes: packed of shape [n] or [k, n] -> out [n], fp32, bf16 or fp16.
    """
    if out is None:
        if accumulate:
            raise ValueError(f"{UNPACK}: accumulate=True needs `out` to add to")
        out = torch.empty(packed.shape[-1], dtype=dtype or packed.dtype, device=packed.signs.device)
    signs, scales = (t[None] if t.dim() == 1 else t for t in (packed.signs, packed.scales))
    ready("bits", out.device)
    UNPACK_OP(signs, scales, out, packed.block, factor, accumulate)
    return out


# -- checks ------------------------------------------------------------------------------------------------


def _check_signs(op: str, signs: Tensor, scales: Tensor, shape: Sequence[int], block: int) -> None:
    check.number(op, "block", block, "a positive multiple of 16", block > 0 and block % 16 == 0)
    lead, numel, device = tuple(shape[:-1]), shape[-1], signs.device
    check.tensor(op, "signs", signs, dtypes=(torch.uint8,), shape=(*lead, -(-numel // 8)))
    blocks = -(-numel // block)
    check.tensor(op, "scales", scales, dtypes=(torch.float32,), shape=(*lead, blocks), device=device)


def _check_pack(
    value: Tensor, error: Tensor | None, signs: Tensor, scales: Tensor, block: int, l2: bool = False
) -> None:
    check.tensor(PACK, "value", value, dtypes=DTYPES, dims=1)
    if error is not None:
        shape = tuple(value.shape)
        check.tensor(PACK, "error", error, dtypes=(torch.float32,), shape=shape, device=value.device)
    check.tensor(PACK, "signs", signs, device=value.device)
    _check_signs(PACK, signs, scales, value.shape, block)


def _check_unpack(
    signs: Tensor, scales: Tensor, out: Tensor, block: int, factor: float = 1.0, accumulate: bool = False
) -> None:
    check.tensor(UNPACK, "out", out, dtypes=DTYPES, shape=(None,))
    check.tensor(UNPACK, "signs", signs, dims=2, device=out.device)
    check.number(UNPACK, "factor", factor, "finite", math.isfinite(factor))
    _check_signs(UNPACK, signs, scales, (signs.shape[0], out.shape[0]), block)


# -- the ops: over rows --------------------------------------------------------------------------------------

PackRows = Callable[[Tensor, Tensor | None, Tensor, Tensor, int, bool], None]
UnpackRows = Callable[[Tensor, Tensor, Tensor, int, float, bool], None]


def pack_with(run: PackRows) -> Callable[..., None]:
    """The op over something that packs rows."""

    def pack(
        value: Tensor, error: Tensor | None, signs: Tensor, scales: Tensor, block: int, l2: bool = False
    ) -> None:
        _check_pack(value, error, signs, scales, block)
        check.apart(PACK, {"value": value, "error": error, "signs": signs, "scales": scales}, ("value",))
        if not value.numel() or value.is_meta:
            return
        given = [part for part in (signs, scales, error) if part is not None]
        rows = [read_rows(part) for part in given]
        run(read_rows(value), None if error is None else rows[2], rows[0], rows[1], block, l2)
        for part, row in zip(given, rows, strict=True):
            give_back(part, row)

    return pack


def unpack_with(run: UnpackRows) -> Callable[..., None]:
    """The op over something that unpacks rows."""

    def unpack(
        signs: Tensor, scales: Tensor, out: Tensor, block: int, factor: float = 1.0, accumulate: bool = False
    ) -> None:
        _check_unpack(signs, scales, out, block, factor)
        check.apart(UNPACK, {"signs": signs, "scales": scales, "out": out}, ("signs", "scales"))
        if out.numel() and not out.is_meta:
            row = read_rows(out)
            run(read_rows(signs), read_rows(scales), row, block, factor, accumulate)
            give_back(out, row)

    return unpack


def _spread(scales: Tensor, block: int, numel: int) -> Tensor:
    return scales.repeat_interleave(block, dim=1)[:, :numel]


def pack_rows(
    value: Tensor, error: Tensor | None, signs: Tensor, scales: Tensor, block: int, l2: bool
) -> None:
    """The reference."""
    rows, numel = value.shape
    total = value.to(torch.float32) if error is None else value.to(torch.float32) + error
    above = ~(total < 0)
    bits = torch.nn.functional.pad(above, (0, -numel % 8)).view(rows, -1, 8)
    weights = 2 ** torch.arange(8, device=value.device)
    signs.copy_((bits * weights).sum(-1))
    size = total.double().square() if l2 else total.double().abs()
    size = torch.nn.functional.pad(size, (0, -numel % block)).view(rows, -1, block).sum(-1)
    size /= block_sizes(numel, block, value.device)
    scales.copy_(size.sqrt() if l2 else size)
    if error is not None:
        step = _spread(scales, block, numel)
        error.copy_(total - torch.where(above, step, -step))


def block_sizes(numel: int, block: int, device: torch.device) -> Tensor:
    """How many elements each block of a row has."""
    starts = torch.arange(0, numel, block, device=device)
    return (numel - starts).clamp_max(block)


def unpack_rows(
    signs: Tensor, scales: Tensor, out: Tensor, block: int, factor: float, accumulate: bool
) -> None:
    """The reference."""
    numel = out.shape[1]
    total = torch.zeros(numel, device=out.device)
    for row, steps in zip(signs, _spread(scales, block, numel), strict=True):
        bits = (row[:, None] >> torch.arange(8, dtype=torch.uint8, device=out.device)) & 1
        total += torch.where(bits.flatten()[:numel] != 0, steps, -steps)
    total = total * torch.tensor(factor, dtype=torch.float32, device=out.device)
    out.copy_(out.to(torch.float32) + total if accumulate else total)


class _Call(ctypes.Structure):
    """DsSigns of sources/bits/bits_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "errors", "signs", "scales")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("values", "errors", "signs", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "numel", "block")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "flag", "isa", "threads")),
    )


def _call(tensors: Sequence[Tensor | None], block: int, factor: float, flag: bool, isa: int) -> _Call:
    values, signs = tensors[0], tensors[2]
    assert values is not None
    assert signs is not None
    return _Call(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(0 if t is None else t.stride(0) for t in tensors),
        signs.shape[0], values.shape[1], block, factor,
        code(values.dtype), flag, isa, torch.get_num_threads(),
    )  # fmt: skip


def _pack_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_pack_signs", ctypes.POINTER(_Call))

    def run(value: Tensor, error: Tensor | None, signs: Tensor, scales: Tensor, block: int, l2: bool) -> None:
        native(_call((value, error, signs, scales), block, 1.0, l2, library.isa_code))
        written([signs, scales] if error is None else [signs, scales, error])

    return pack_with(run)


def _unpack_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_unpack_signs", ctypes.POINTER(_Call))

    def run(signs: Tensor, scales: Tensor, out: Tensor, block: int, factor: float, accumulate: bool) -> None:
        native(_call((out, None, signs, scales), block, factor, accumulate, library.isa_code))
        written([out])

    return unpack_with(run)


def pack_bound(args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    """How far errors, signs (not at all) and scales may be from the reference's.

    Norms of n < 2^25 values summed in double in any order agree to n 2^-53 < 2^-28, so that of the fp32 they
    are rounded to the last bit may differ: 2^-23 of the scale, and of the error, which subtracts it, besides
    its own last bit.
    """
    scales = wanted[-1]
    bounds: list[Any] = [0.0, scales.abs().double() * 2.0**-22]
    if args[1] is not None:
        numel, block = args[0].shape[-1], args[4]
        step = scales.repeat_interleave(block, dim=-1)[..., :numel].abs() + wanted[0].abs()
        bounds.insert(0, step.double() * 2.0**-22)
    return bounds


PACK_OP = define(
    Kernel(
        name=PACK,
        schema=(
            "(Tensor value, Tensor(a!)? error, Tensor(b!) signs, Tensor(c!) scales, int block, "
            "bool l2=False) -> ()"
        ),
        family="bits",
        reference=pack_with(pack_rows),
        fake=_check_pack,
        native=_pack_native,
        triton=lambda module: pack_with(cast(PackRows, module.pack)),
        bound=pack_bound,
    )
)
UNPACK_OP = define(
    Kernel(
        name=UNPACK,
        schema=(
            "(Tensor signs, Tensor scales, Tensor(a!) out, int block, float factor=1.0, "
            "bool accumulate=False) -> ()"
        ),
        family="bits",
        reference=unpack_with(unpack_rows),
        fake=_check_unpack,
        native=_unpack_native,
        triton=lambda module: unpack_with(cast(UnpackRows, module.unpack)),
    )
)
