"""What the activations and the dropout are tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.activation import KINDS

_CPU = torch.device("cpu")
_SHAPES = ((0, 4), (3, 2), (2, 3, 34), (1, 1500))


def _glu(device: torch.device, *, backward: bool) -> Iterator[Sample]:
    for dtype, shape, kind, packed in product(DTYPES, _SHAPES, KINDS, (False, True)):
        values = Values(11, device)
        x = values.normal(*shape, dtype=dtype, scale=4)
        up = None if packed else values.normal(*shape, dtype=dtype)
        dy = values.normal(*shape[:-1], shape[-1] // (2 if packed else 1), dtype=dtype)
        free = {"x.shape", "x.device"} if packed and not backward else {"x.shape"} if packed else set()
        args = (dy, x, up) if backward else (x, up)
        yield Sample(f"{kind} {shape} {dtype} packed {packed}", args, {"kind": kind}, free=frozenset(free))


def _act(device: torch.device, *, backward: bool) -> Iterator[Sample]:
    for dtype, shape, kind in product(DTYPES, _SHAPES, KINDS):
        values = Values(12, device)
        x, dy = values.normal(*shape, dtype=dtype, scale=4), values.normal(*shape, dtype=dtype)
        bias = values.normal(shape[-1]) if shape != (3, 2) else None
        free = frozenset({"x.shape", "x.device"} if bias is None and not backward else ())
        args = (dy, x, bias) if backward else (x, bias)
        yield Sample(f"{kind} {shape} {dtype}", args, {"kind": kind}, free=free)


def _seed(device: torch.device) -> Tensor:
    return torch.tensor([-(2**61) + 12345], device=device)


def _dropout(device: torch.device) -> Iterator[Sample]:
    for dtype, shape, p in product(DTYPES, (*_SHAPES, (5, 7)), (0.0, 0.3, 1.0)):
        values = Values(13, device)
        x, residual = values.normal(*shape, dtype=dtype), values.normal(*shape, dtype=dtype)
        bias = values.normal(shape[-1], dtype=dtype) if p else None
        yield Sample(f"{p} {shape} {dtype}", (x, bias, residual, _seed(device)), {"p": p})


def _dropout_backward(device: torch.device) -> Iterator[Sample]:
    for dtype, shape in product(DTYPES, (*_SHAPES, (5, 7))):
        dy = Values(14, device).normal(*shape, dtype=dtype)
        free = frozenset({"dy.shape", "dy.device"})
        yield Sample(f"{shape} {dtype}", (dy, _seed(device)), {"p": 0.3}, free=free)


SAMPLES: Mapping[str, Samples] = {
    "glu": lambda device: _glu(device, backward=False),
    "glu_backward": lambda device: _glu(device, backward=True),
    "act": lambda device: _act(device, backward=False),
    "act_backward": lambda device: _act(device, backward=True),
    "bias_dropout_add": _dropout,
    "dropout_backward": _dropout_backward,
}


def _leaf(values: Values, *shape: int) -> Tensor:
    return values.normal(*shape, dtype=torch.float64).requires_grad_()


def _glu_gradients() -> Iterator[Sample]:
    for kind in KINDS:
        values = Values(15, _CPU)
        yield Sample(kind, (_leaf(values, 2, 3), _leaf(values, 2, 3)), {"kind": kind})
        yield Sample(f"{kind} packed", (_leaf(values, 2, 6), None), {"kind": kind})


def _act_gradients() -> Iterator[Sample]:
    for kind in KINDS:
        values = Values(16, _CPU)
        yield Sample(kind, (_leaf(values, 2, 3, 4), _leaf(values, 4)), {"kind": kind})


def _dropout_gradients() -> Iterator[Sample]:
    values = Values(17, _CPU)
    given: tuple[Any, ...] = (_leaf(values, 3, 5), _leaf(values, 5), _leaf(values, 3, 5), _seed(_CPU))
    yield Sample("dropout", given, {"p": 0.4})


GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {
    "glu": _glu_gradients,
    "act": _act_gradients,
    "bias_dropout_add": _dropout_gradients,
}
