"""Block-wise quantisation to int8, int4, fp8, fp6 and fp12, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code, written
from ds_kernels.ops.quant_formats import FORMATS, Format, Rounding, decode, encode
from ds_kernels.ops.rows import as_bytes, give_back, read_rows
from ds_kernels.registry import Kernel, define, ready

FormatName = Literal["int8", "uint8", "int4", "uint4", "e4m3", "e5m2", "e3m2", "e4m7"]
QUANTIZE, DEQUANTIZE = "quantize_blocks_", "dequantize_blocks_"


@dataclass(frozen=True)
class Blocks:
    """A tensor of `shape` and `dtype`, quantised in blocks along its last dimension.

    `codes` [..., bytes], lowest bits first; `scales` and, of an asymmetric format, `zeros` [..., blocks].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    format: FormatName
    block: int


def allocate_blocks(
    shape: torch.Size | tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    format: FormatName = "int8",
    block: int = 256,
    device: torch.device | None = None,
) -> Blocks:
    """Memory for a tensor in blocks, its content undefined.

    Raises: ValueError for an unknown format or a block that is no positive multiple of 16.
    """
    form, lead = form_of("allocate_blocks", "format", format, block), tuple(shape[:-1])
    codes = torch.empty((*lead, form.num_bytes(shape[-1])), dtype=form.storage, device=device)
    scales = torch.empty((*lead, -(-shape[-1] // block)), device=device)
    zeros = torch.empty_like(scales) if form.asymmetric else None
    return Blocks(codes, scales, zeros, torch.Size(shape), dtype, format, block)


@torch.no_grad()
def quantize_blocks(
    x: Tensor,
    *,
    format: FormatName = "int8",
    block: int = 256,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    first_block: int = 0,
    out: Blocks | None = None,
) -> Blocks:
    """Quantise a tensor in blocks of `block` elements along its last dimension; a row's last may be shorter.

    int8, int4: code * scale, scale = max|x| / 127 or / 7. uint8, uint4: code * scale + zero, zero = min x,
    scale = (max x - min x) / 255 or / 15. e4m3, e5m2 (torch's float8), e3m2 (fp6, 4 codes in 3 bytes), e4m7
    (fp12, 2 in 3): float * scale, scale = max|x| / the format's largest value, to nearest even.

    Error, of x finite, before `dequantize_blocks` rounds to its dtype: of an integer at most scale / 2
    (stochastic: scale) plus 2^-21 of the block's max|x|; of a float 2^-(mantissa + 1) |x|, or half a step of
    the subnormals (scale * 2^(-bias - mantissa)) if that is more, plus 2^-22 |x|.
    Stochastic rounding (integers) is unbiased to 2^-17 of a scale. The same `seed`, and for a part of a
    tensor the number of its first block, give the same bits on any device, instruction set and threads.
    A block with a NaN, an infinity or a magnitude (asymmetric: a range) of 2^127 decodes to NaN; no other.
    Shapes: x [..., n] fp32, bf16 or fp16. `out` says format and block itself: from `allocate_blocks`, or
    views of your own of its shapes, such as columns of a wire buffer.
    """
    by_chance = stochastic(QUANTIZE, rounding)
    if x.dim() == 0:
        check.refuse(QUANTIZE, "x", x, "at least 1 dimension")
    made = out or allocate_blocks(x.shape, dtype=x.dtype, format=format, block=block, device=x.device)
    ready("quant", x.device)
    QUANTIZE_OP(
        x, made.codes, made.scales, made.zeros, made.format, made.block, by_chance, seed, first_block
    )  # fmt: skip
    return made


@torch.no_grad()
def dequantize_blocks(
    blocks: Blocks, *, dtype: torch.dtype | None = None, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """The values of a quantised tensor, computed in fp32 and rounded once to fp32, bf16 or fp16.

    `accumulate` adds to what `out` holds, in fp32.
    """
    if out is None:
        if accumulate:
            raise ValueError(f"{DEQUANTIZE}: accumulate=True needs `out` to add to")
        out = torch.empty(blocks.shape, dtype=dtype or blocks.dtype, device=blocks.codes.device)
    ready("quant", out.device)
    DEQUANTIZE_OP(
        blocks.codes, blocks.scales, blocks.zeros, out, blocks.format, blocks.block, accumulate
    )  # fmt: skip
    return out


# -- what all ops on blocks share ---------------------------------------------------------------------------


class Parts(NamedTuple):
    """Codes, scales and (asymmetric) zeros."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def named(self, prefix: str = "") -> dict[str, Tensor | None]:
        """By the names of an op's arguments."""
        return {prefix + name: part for name, part in zip(self._fields, self, strict=True)}

    def read(self) -> Parts:
        """As rows; codes as uint8."""
        zeros = None if self.zeros is None else read_rows(self.zeros)
        return Parts(read_rows(as_bytes(self.codes)), read_rows(self.scales), zeros)

    def give_back(self, rows: Parts) -> None:
        """Copy what was written to the rows, where they are not views."""
        give_back(as_bytes(self.codes), rows.codes)
        give_back(self.scales, rows.scales)
        if self.zeros is not None and rows.zeros is not None:
            give_back(self.zeros, rows.zeros)

    def set(self, made: tuple[Tensor, Tensor, Tensor]) -> None:
        """Copy what `encode` made."""
        for part, value in zip(self, made, strict=True):
            if part is not None:
                part.copy_(value)

    def written(self) -> None:
        """Tell autograd."""
        written([part for part in self if part is not None])


def stochastic(op: str, rounding: str) -> bool:
    """Raise ValueError unless `rounding` is a way to round."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{op}: rounding={rounding!r}; wanted: 'nearest' or 'stochastic'")
    return rounding == "stochastic"


def form_of(op: str, argument: str, name: str, block: int) -> Format:
    """The format of a name. Raises ValueError for another one, and for a block that does not fit."""
    if name not in FORMATS:
        raise ValueError(f"{op}: {argument}={name!r} is not known; wanted: one of {', '.join(FORMATS)}")
    check.number(op, "block", block, "a positive multiple of 16", block > 0 and block % 16 == 0)
    return FORMATS[name]


def check_parts(
    op: str,
    parts: Parts,
    shape: tuple[int, ...],
    format: str,
    block: int,
    device: torch.device,
    prefix: str = "",
) -> Format:
    """Raise ValueError unless these can hold a tensor of `shape`."""
    form, lead, numel = form_of(op, f"{prefix}format", format, block), shape[:-1], shape[-1]
    dtypes = tuple(dict.fromkeys((torch.uint8, form.storage)))
    num_bytes = form.num_bytes(numel)
    check.tensor(op, f"{prefix}codes", parts.codes, dtypes=dtypes, device=device, shape=(*lead, num_bytes))
    if form.asymmetric is not (parts.zeros is not None):
        wanted = "a tensor like scales" if form.asymmetric else "None"
        check.refuse(op, f"{prefix}zeros", parts.zeros, f"{wanted}, with format {format}")
    for name, part in list(parts.named(prefix).items())[1:]:
        if part is not None:
            num_blocks = -(-numel // block)
            check.tensor(op, name, part, dtypes=(torch.float32,), device=device, shape=(*lead, num_blocks))
    return form


def check_rounding(
    op: str, form: Format, stochastic: bool = False, seed: int = 0, first_block: int = 0
) -> Rounding:
    """Raise ValueError unless values of the format can be rounded so."""
    if stochastic and form.exponent:
        raise ValueError(f"{op}: stochastic=True needs an integer format; floats are rounded to nearest")
    check.number(op, "seed", seed, ">= 0", seed >= 0)
    check.number(op, "first_block", first_block, ">= 0", first_block >= 0)
    return Rounding(stochastic, seed, first_block)


# -- the ops -----------------------------------------------------------------------------------------------

# Over rows: values [rows, n], parts [rows, ...], format, block, and how to round or whether to add.
QuantizeRows = Callable[[Tensor, Parts, Format, int, Rounding], None]
DequantizeRows = Callable[[Parts, Tensor, Format, int, bool], None]


def _check_quantize(
    x: Tensor, parts: Parts, format: str, block: int, *how: Any, **more: Any
) -> tuple[Format, Rounding]:
    check.tensor(QUANTIZE, "x", x, dtypes=DTYPES, dims=1)
    form = check_parts(QUANTIZE, parts, tuple(x.shape), format, block, x.device)
    return form, check_rounding(QUANTIZE, form, *how, **more)


def _check_dequantize(parts: Parts, out: Tensor, format: str, block: int) -> Format:
    check.tensor(DEQUANTIZE, "out", out, dtypes=DTYPES, dims=1)
    return check_parts(DEQUANTIZE, parts, tuple(out.shape), format, block, out.device)


def quantize_fake(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any, **more: Any
) -> None:
    """The op while torch traces: checks only."""
    _check_quantize(x, Parts(codes, scales, zeros), *rest, **more)


def dequantize_fake(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, block: int,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """The op while torch traces: checks only."""
    _check_dequantize(Parts(codes, scales, zeros), out, format, block)


def quantize_with(run: QuantizeRows) -> Callable[..., None]:
    """The op over something that quantises rows."""

    def quantize(
        x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: str, block: int,
        *how: Any, **more: Any,
    ) -> None:  # fmt: skip
        parts = Parts(codes, scales, zeros)
        form, rounding = _check_quantize(x, parts, format, block, *how, **more)
        check.apart(QUANTIZE, {"x": x, **parts.named()}, ("x",))
        if x.numel() and not x.is_meta:
            rows = parts.read()
            run(read_rows(x), rows, form, block, rounding)
            parts.give_back(rows)

    return quantize


def dequantize_with(run: DequantizeRows) -> Callable[..., None]:
    """The op over something that dequantises rows."""

    def dequantize(
        codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, block: int,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        parts = Parts(codes, scales, zeros)
        form = _check_dequantize(parts, out, format, block)
        check.apart(DEQUANTIZE, {**parts.named(), "out": out}, parts.named())
        if out.numel() and not out.is_meta:
            rows = read_rows(out)
            run(parts.read(), rows, form, block, accumulate)
            give_back(out, rows)

    return dequantize


def quantize_rows(x: Tensor, parts: Parts, form: Format, block: int, how: Rounding) -> None:
    """The reference."""
    parts.set(encode(x, form, block, how))


def dequantize_rows(parts: Parts, out: Tensor, form: Format, block: int, add: bool) -> None:
    """The reference."""
    values = decode(*parts, form, block, out.shape[1])
    out.copy_(out.to(torch.float32) + values if add else values)


class Call(ctypes.Structure):
    """DsBlocks of sources/quant/quant.h, field by field: one side in blocks, one side in floats."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "codes", "scales", "zeros")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("values", "codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "numel", "block", "seed", "first_block")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "format", "flag", "isa", "threads")),
    )


def blocks_call(
    values: Tensor | None,
    parts: Parts,
    form: Format,
    block: int,
    numel: int,
    isa: int,
    how: Rounding = Rounding(),  # noqa: B008 (frozen)
    flag: bool = False,
) -> Call:
    """The structure for rows of values, and rows of codes, scales and zeros."""
    tensors = (values, *parts)
    return Call(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(0 if t is None else t.stride(0) for t in tensors),
        parts[0].shape[0], numel, block, how.seed, how.first_block,
        1.0, code(torch.float32 if values is None else values.dtype), form.code, flag or how.stochastic,
        isa, torch.get_num_threads(),
    )  # fmt: skip


def _quantize_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_quantize_blocks", ctypes.POINTER(Call))

    def run(x: Tensor, parts: Parts, form: Format, block: int, how: Rounding) -> None:
        native(blocks_call(x, parts, form, block, x.shape[1], library.isa_code, how))
        parts.written()

    return quantize_with(run)


def _dequantize_native(library: Native) -> Callable[..., None]:
    native = library.function("ds_dequantize_blocks", ctypes.POINTER(Call))

    def run(parts: Parts, out: Tensor, form: Format, block: int, add: bool) -> None:
        native(blocks_call(out, parts, form, block, out.shape[1], library.isa_code, flag=add))
        written([out])

    return dequantize_with(run)


QUANTIZE_OP = define(
    Kernel(
        name=QUANTIZE,
        schema=(
            "(Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, str format, int block, "
            "bool stochastic=False, int seed=0, int first_block=0) -> ()"
        ),
        family="quant",
        reference=quantize_with(quantize_rows),
        fake=quantize_fake,
        native=_quantize_native,
        triton=lambda module: quantize_with(cast(QuantizeRows, module.quantize)),
    )
)
DEQUANTIZE_OP = define(
    Kernel(
        name=DEQUANTIZE,
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, Tensor(a!) out, str format, int block, "
            "bool accumulate=False) -> ()"
        ),
        family="quant",
        reference=dequantize_with(dequantize_rows),
        fake=dequantize_fake,
        native=_dequantize_native,
        triton=lambda module: dequantize_with(cast(DequantizeRows, module.dequantize)),
    )
)
