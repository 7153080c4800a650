"""What the ops on signs and on buffers are tried with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.bits import PACK, UNPACK, allocate_signs
from ds_kernels.ops.sums import NAME

# rows (0: one dimension), elements, block: nothing, tails of bytes and vectors, more than a piece of a thread
_SHAPES = ((0, 0, 16), (0, 16, 32), (3, 100, 64), (2, 1000, 256), (0, 33, 1024), (2, 20008, 10000))


def _pack(device: torch.device) -> Iterator[Sample]:
    for number, ((rows, numel, block), dtype) in enumerate(product(_SHAPES, DTYPES)):
        values = Values(number, device)
        shape = (rows, numel) if rows else (numel,)
        x, error = values.normal(*shape, dtype=dtype), values.normal(*shape) if number % 4 else None
        x[..., ::5] = 0
        if rows > 2:
            x[1] = 0
            x[2, :2] = torch.tensor([float("nan"), float("-inf")])
        made = allocate_signs(shape, block=block, device=device)
        made.signs.zero_()
        made.scales.zero_()
        yield Sample(
            f"{shape} {dtype} in {block}{', error' if error is not None else ''}",
            (x, error, made.signs, made.scales, block, bool(number % 2)),
            free=frozenset({"value.shape"}) if numel % 8 else frozenset(),
        )


def _unpack(device: torch.device) -> Iterator[Sample]:
    for number, ((rows, numel, block), dtype) in enumerate(product(_SHAPES, DTYPES)):
        values = Values(number, device)
        made = allocate_signs((rows, numel), block=block, device=device)
        signs = values.integers(*made.signs.shape, low=0, high=256, dtype=torch.uint8)
        out, scales = values.normal(numel, dtype=dtype), values.normal(*made.scales.shape)
        yield Sample(
            f"{rows} of {numel} {dtype} in {block}",
            (signs, scales, out, block, 0.3, bool(number % 2)),
            free=frozenset({"out.shape"}) if numel % 8 else frozenset(),
        )


def _sum(device: torch.device) -> Iterator[Sample]:
    for number, (to, dtype) in enumerate(product(DTYPES, DTYPES)):
        for numel, count in ((0, 2), (1, 1), (33, 6), (1000, number % 10), (20000, 2)):
            values = Values(number, device)
            sources = [values.normal(numel, dtype=dtype) for _ in range(count)]
            out = values.normal(numel, dtype=to)
            free = frozenset({"sources.alias", *(() if count else ("out.shape",))})
            yield Sample(f"{count} of {numel} {dtype} to {to}", (out, sources, 0.7), free=free)


SAMPLES: Mapping[str, Samples] = {PACK: _pack, UNPACK: _unpack, NAME: _sum}
