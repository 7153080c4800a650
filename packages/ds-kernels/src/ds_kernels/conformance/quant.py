"""What the ops of block-wise quantisation are tried with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.quant import (
    DEQUANTIZE,
    QUANTIZE,
    Blocks,
    allocate_blocks,
    quantize_rows,
    quantize_with,
)
from ds_kernels.ops.quant_formats import FORMATS
from ds_kernels.ops.quant_reduce import REQUANTIZE, SUM

# rows, elements, block: nothing, a part of a group, tails of every format, more than a thread's piece of work
_SHAPES = ((1, 0, 16), (1, 4, 16), (3, 100, 64), (2, 1004, 256), (5, 68, 48), (1, 36, 1024))
_LONG = (3, 24580, 256)
_NAMES = ("x", "codes", "scales", "zeros")


def _values(values: Values, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers with what is special: zeros, a row of nothing but zeros, infinities and NaNs."""
    x = values.normal(*shape, dtype=torch.float32)
    x[..., ::7] *= 1e-3
    x[..., 1::11] = 0
    if x.dim() > 1 and x.shape[0] > 2:
        x[1, :] = 0
        x[2, : min(x.shape[1], 5)] = torch.tensor([float("nan"), float("inf"), 1.0, -0.0, -1e30])[
            : x.shape[1]
        ]
    return x.to(dtype)


def _cases(device: torch.device) -> Iterator[tuple[str, Tensor, Blocks]]:
    for number, name in enumerate(FORMATS):
        for i, dtype in enumerate(DTYPES):
            values = Values(number, device)
            shapes = _SHAPES[(number + i) % 3 :: 3]
            if name in ("int8", "uint4", "e3m2") and not i:
                shapes += (_LONG,)
            for rows, numel, block in shapes:
                shape = (numel,) if rows == 1 else (rows, numel)
                x = _values(values, shape, dtype)
                blocks = allocate_blocks(shape, format=name, block=block, device=device)  # type: ignore[arg-type]
                if FORMATS[name].exponent:  # torch's own checks cannot compare float8
                    blocks = replace(blocks, codes=blocks.codes.view(torch.uint8))
                for part in (blocks.codes, blocks.scales, blocks.zeros):
                    if part is not None:
                        part.zero_()
                yield f"{name} {dtype} {shape} in {block}", x, blocks


def _quantize(device: torch.device) -> Iterator[Sample]:
    for number, (label, x, blocks) in enumerate(_cases(device)):
        stochastic = number % 2 == 0 and not FORMATS[blocks.format].exponent
        how = {"stochastic": True, "seed": 2**40 + 5, "first_block": 2**33 + 1} if stochastic else {}
        yield Sample(
            f"{label}{', stochastic' if stochastic else ''}",
            (x, blocks.codes, blocks.scales, blocks.zeros, blocks.format, blocks.block),
            how,
        )


def _dequantize(device: torch.device) -> Iterator[Sample]:
    for number, (label, x, blocks) in enumerate(_cases(device)):
        quantize_with(quantize_rows)(
            x, blocks.codes, blocks.scales, blocks.zeros, blocks.format, blocks.block
        )  # fmt: skip
        out = Values(3, device).normal(*x.shape, dtype=x.dtype)
        add = bool(number % 2)
        yield Sample(
            f"{label}{' added' if add else ''}",
            (blocks.codes, blocks.scales, blocks.zeros, out, blocks.format, blocks.block, add),
        )


def _chunks(device: torch.device) -> Iterator[tuple[str, Blocks]]:
    """Quantised chunks [k, n], in every format."""
    for number, name in enumerate(FORMATS):
        chunks, numel, block = ((1, 100, 64), (3, 1004, 256), (0, 36, 16), (5, 68, 48))[number % 4]
        blocks = allocate_blocks((chunks, numel), format=name, block=block, device=device)  # type: ignore[arg-type]
        x = Values(number, device).normal(chunks, numel)
        blocks = replace(blocks, codes=blocks.codes.view(torch.uint8))
        quantize_with(quantize_rows)(x, blocks.codes, blocks.scales, blocks.zeros, name, block)
        yield f"{name} {chunks} of {numel} in {block}", blocks


def _sum(device: torch.device) -> Iterator[Sample]:
    for (label, blocks), dtype in product(_chunks(device), DTYPES):
        out = Values(3, device).normal(blocks.shape[-1], dtype=dtype)
        yield Sample(
            f"{label} to {dtype}",
            (blocks.codes, blocks.scales, blocks.zeros, out, blocks.format, blocks.block, 0.37),
        )


def _requantize(device: torch.device) -> Iterator[Sample]:
    targets = list(FORMATS)
    for number, (label, blocks) in enumerate(_chunks(device)):
        name = targets[number * 3 % 8 if number % 2 else number]
        out = allocate_blocks(blocks.shape[1:], format=name, block=blocks.block, device=device)  # type: ignore[arg-type]
        out = replace(out, codes=out.codes.view(torch.uint8))
        for part in (out.codes, out.scales, out.zeros):
            if part is not None:
                part.zero_()
        yield Sample(
            f"{label} to {name}",
            (blocks.codes, blocks.scales, blocks.zeros, out.codes, out.scales, out.zeros, blocks.shape[-1]),
            {
                "format": blocks.format, "out_format": name, "block": blocks.block, "factor": 0.25,
                "stochastic": not FORMATS[name].exponent, "seed": 77, "first_block": 5,
            },
        )  # fmt: skip


SAMPLES: Mapping[str, Samples] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    SUM: _sum,
    REQUANTIZE: _requantize,
}
