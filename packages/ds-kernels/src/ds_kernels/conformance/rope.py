"""What the rotary embedding is tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.rope import rotary_tables

_CPU = torch.device("cpu")
# x's shape and how many of its elements are turned
_SHAPES = (((2, 0, 3, 8), 8), ((5, 2, 6), 6), ((2, 3, 2, 10), 4), ((2, 4, 9, 66), 66), ((1, 2, 2, 1, 4), 2))


def _samples(device: torch.device) -> Iterator[Sample]:
    for dtype, (shape, turned), interleaved in product(DTYPES, _SHAPES, (False, True)):
        values = Values(19, device)
        cos, sin = rotary_tables(17, turned, device=device)
        size = shape[-3:-2] if len(shape) == 3 else shape[:-2]
        args = (values.normal(*shape, dtype=dtype), cos, sin, values.integers(*size, low=0, high=17))
        how = {"interleaved": interleaved, "inverse": dtype == torch.bfloat16}
        yield Sample(f"{shape} {turned} {dtype} interleaved {interleaved}", args, how)


SAMPLES: Mapping[str, Samples] = {"rope": _samples, "rope_": _samples}


def _gradients() -> Iterator[Sample]:
    for interleaved in (False, True):
        x = Values(20, _CPU).normal(2, 3, 2, 6, dtype=torch.float64).requires_grad_()
        args = (x, *rotary_tables(9, 4), torch.tensor([[0, 3, 8], [1, 1, 2]]))
        yield Sample(f"interleaved {interleaved}", args, {"interleaved": interleaved, "inverse": False})


GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {"rope": _gradients}
