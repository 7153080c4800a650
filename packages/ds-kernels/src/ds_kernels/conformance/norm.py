"""What the norms are tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES

_CPU = torch.device("cpu")
_SHAPES = ((0, 5), (3, 1), (2, 3, 33), (70, 16), (2, 1100))


def _forward(device: torch.device) -> Iterator[Sample]:
    for dtype, shape, center in product(DTYPES, _SHAPES, (False, True)):
        values = Values(7, device)
        x = values.normal(*shape, dtype=dtype)
        full = len(shape) == 3 or shape[-1] == 1100
        residual = values.normal(*shape, dtype=dtype) if full else None
        weight = values.normal(shape[-1], dtype=torch.float32 if full else dtype) if shape[-1] > 1 else None
        bias = values.normal(shape[-1], dtype=dtype) if center else None
        label = f"{'layer' if center else 'rms'} {shape} {dtype}"
        alone = {"x.shape", "x.device"} if weight is None and bias is None else set()
        yield Sample(
            label, (x, residual, weight, bias), {"eps": 1e-5, "center": center}, free=frozenset(alone)
        )


def _backward(device: torch.device) -> Iterator[Sample]:
    for dtype, shape, center in product(DTYPES, _SHAPES, (False, True)):
        values = Values(8, device)
        dy, dtotal, x = (values.normal(*shape, dtype=dtype) for _ in range(3))
        full = len(shape) == 3 or shape[-1] == 1100
        weight = values.normal(shape[-1], dtype=torch.float32 if full else dtype) if shape[-1] > 1 else None
        mean, rstd = values.normal(*shape[:-1], scale=0.1), values.normal(*shape[:-1]).abs()
        args = (dy, dtotal if full else None, x, weight, mean if center else mean.new_empty(0), rstd)
        how = {"center": center, "want_weight": weight is not None, "want_bias": center}
        yield Sample(f"{'layer' if center else 'rms'} {shape} {dtype}", args, how)


SAMPLES: Mapping[str, Samples] = {"norm": _forward, "norm_backward": _backward}


def _gradients() -> Iterator[Sample]:
    for center, residual in product((False, True), repeat=2):
        values = Values(9, _CPU)
        shapes: tuple[tuple[int, ...], ...] = ((2, 3, 5), (2, 3, 5), (5,), (5,))
        given: list[Any] = [values.normal(*s, dtype=torch.float64).requires_grad_() for s in shapes]
        if not residual:
            given[1] = None
        if not center:
            given[3] = None
        label = f"center {center} residual {residual}"
        yield Sample(label, tuple(given), {"eps": 1e-5, "center": center})


GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {"norm": _gradients}
