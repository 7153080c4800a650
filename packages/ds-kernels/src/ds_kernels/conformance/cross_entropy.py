"""What the cross-entropy ops are tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES

_CPU = torch.device("cpu")
_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0},
    "smooth": {"ignore_index": 0, "label_smoothing": 0.1, "z_loss": 1e-3},
}
_SHAPES = ((0, 5), (3, 1), (4, 33), (2, 1000), (2, 4100))
_FREE = frozenset({"ignore_index.value"})


def _rows(values: Values, shape: tuple[int, int], dtype: torch.dtype, settings: Any) -> tuple[Tensor, Tensor]:
    rows, cols = shape
    target = values.integers(rows, low=0, high=cols)
    target[1::3] = settings["ignore_index"]
    return values.normal(rows, cols, dtype=dtype, scale=3), target


def _samples(make: Callable[[Values, Tensor, Tensor], tuple[Any, ...]]) -> Samples:
    def each(device: torch.device) -> Iterator[Sample]:
        for dtype, shape, name in product(DTYPES, _SHAPES, _SETTINGS):
            values, settings = Values(3, device), _SETTINGS[name]
            args = make(values, *_rows(values, shape, dtype, settings))
            yield Sample(f"{name} {shape} {dtype}", args, dict(settings), free=_FREE)

    return each


def _backward_args(values: Values, logits: Tensor, target: Tensor) -> tuple[Any, ...]:
    return values.normal(len(target)), logits, target, torch.logsumexp(logits.float(), 1)


def _linear(device: torch.device, *, each: bool) -> Iterator[Sample]:
    for dtype, name, grads in product(DTYPES, _SETTINGS, (False,) if each else (True, False)):
        for tokens, width, classes in ((0, 4, 5), (7, 16, 33)):
            values, settings = Values(4, device), _SETTINGS[name]
            target = _rows(values, (tokens, classes), dtype, settings)[1]
            hidden, weight = (
                values.normal(tokens, width, dtype=dtype),
                values.normal(classes, width, dtype=dtype),
            )
            bias = values.normal(classes, dtype=dtype) if name == "smooth" else None
            args: tuple[Any, ...] = (hidden, weight, bias, target)
            more: dict[str, Any] = {"chunk": 3}
            if not each:
                args, more = (*args, values.normal(tokens)), {"chunk": 3, "grads": grads}
            label = f"{name} {dtype} {tokens} tokens {more}"
            yield Sample(label, args, {**settings, **more}, free=_FREE)


SAMPLES: Mapping[str, Samples] = {
    "cross_entropy": _samples(lambda _, logits, target: (logits, target)),
    "cross_entropy_backward": _samples(_backward_args),
    "cross_entropy_": _samples(lambda values, logits, target: (logits, target, values.normal(len(target)))),
    "linear_cross_entropy": lambda device: _linear(device, each=False),
    "linear_cross_entropy_each": lambda device: _linear(device, each=True),
}


def _row_gradients() -> Iterator[Sample]:
    for name, settings in _SETTINGS.items():
        logits, target = _rows(Values(5, _CPU), (4, 6), torch.float64, settings)
        yield Sample(name, (logits.requires_grad_(), target), dict(settings))


def _linear_gradients(*, each: bool) -> Iterator[Sample]:
    for name, settings in _SETTINGS.items():
        values = Values(6, _CPU)
        target = _rows(values, (4, 6), torch.float64, settings)[1]
        shapes = ((4, 3), (6, 3), (6,))
        given = [values.normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        more: dict[str, Any] = {"chunk": 3}
        if each:
            yield Sample(name, (*given, target), {**settings, **more})
        else:
            scale = values.normal(4, dtype=torch.float64).requires_grad_()
            yield Sample(name, (*given, target, scale), {**settings, **more, "grads": True})


GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {
    "cross_entropy": _row_gradients,
    "linear_cross_entropy": lambda: _linear_gradients(each=False),
    "linear_cross_entropy_each": lambda: _linear_gradients(each=True),
}
