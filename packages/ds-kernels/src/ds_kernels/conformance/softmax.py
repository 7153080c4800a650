"""What the softmax is tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES

_CPU = torch.device("cpu")
# x, mask (None: none; of 1 where it broadcasts), is the mask boolean
_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...] | None, bool], ...] = (
    ((0, 3), None, False),
    ((5, 1), (5, 1), True),
    ((2, 3, 4, 33), (2, 1, 1, 33), True),
    ((2, 3, 4, 17), (4, 1), False),
    ((1, 2, 2, 3, 35), (2, 1, 3, 35), False),
    ((2, 1100), (2, 1100), False),
    ((1, 4101), None, False),
    ((1, 1, 16390), (16390,), True),  # longer than a GPU's program holds
    ((2, 16390), (2, 16390), False),
)


def _forward(device: torch.device) -> Iterator[Sample]:
    for dtype, (shape, like, plain), causal in product(DTYPES, _CASES, (False, True)):
        values = Values(23, device)
        x, mask = values.normal(*shape, dtype=dtype, scale=3), None
        free = {"x.shape", "x.device"} if like is None else {"mask.dtype"}
        if like is not None:
            mask = values.normal(*like, dtype=dtype)
            mask = mask > 0 if plain else mask
        if like == shape[-1:] or (like is not None and len(like) == 1):
            free.add("mask.shape")
        label = f"{shape} mask {like} {dtype} causal {causal}"
        yield Sample(label, (x, mask), {"scale": 0.7, "causal": causal}, free=frozenset(free))


def _backward(device: torch.device) -> Iterator[Sample]:
    for dtype, shape in product(DTYPES, ((0, 3), (5, 1), (2, 3, 33), (2, 1100), (2, 16390))):
        values = Values(24, device)
        dy, y = values.normal(*shape, dtype=dtype), values.normal(*shape).softmax(-1).to(dtype)
        yield Sample(f"{shape} {dtype}", (dy, y), {"scale": -1.5})


SAMPLES: Mapping[str, Samples] = {"softmax": _forward, "softmax_backward": _backward}


def _gradients() -> Iterator[Sample]:
    for causal in (False, True):
        values = Values(25, _CPU)
        x = values.normal(2, 3, 5, dtype=torch.float64).requires_grad_()
        mask = values.normal(3, 5) > -1
        yield Sample(f"causal {causal}", (x, mask), {"scale": 0.7, "causal": causal})


GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {"softmax": _gradients}
