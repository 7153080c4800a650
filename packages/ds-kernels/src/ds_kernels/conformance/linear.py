"""What the linear ops are tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.linear_check import NAMES
from ds_kernels.packed import Bits, code_shape, groups_of

# (rows of x, out, in, group): one row, two, tiles and tails of both; _LONG: more than a pass over k
_SHAPES = (
    (1, 9, 64, 0),
    (2, 5, 320, 32),
    (3, 17, 128, 64),
    (7, 12, 200, 96),
    (13, 8, 512, 128),
    (1, 8, 300, 128),
    (0, 3, 64, 0),
    (4, 1, 1, 0),
)
_LONG = (4, 9, 2336, 96)


def _weight(values: Values, bits: Bits, out: int, columns: int, group: int, asymmetric: bool) -> list[object]:
    kind, length = code_shape(bits, columns)
    low, high = (-127, 128) if bits == 8 else (0, 256)
    codes = values.integers(out, length, low=low, high=high, dtype=kind)
    scales = values.normal(out, groups_of(columns, group)) * 0.1
    zeros = values.integers(*scales.shape, low=0, high=16, dtype=torch.uint8) if asymmetric else None
    return [codes, scales, zeros]


def _linear(bits: Bits) -> Samples:
    def samples(device: torch.device) -> Iterator[Sample]:
        values = Values(bits, device)
        for dtype in DTYPES:
            shapes = (*_SHAPES, _LONG) if dtype == torch.bfloat16 else _SHAPES
            for i, (batch, out, columns, group) in enumerate(shapes):
                x = values.normal(batch, columns, dtype=dtype)
                x = x.reshape(columns) if batch == 1 and i else x
                asymmetric = bits == 4 and i % 2 == 1
                weight = _weight(values, bits, out, columns, group, asymmetric)
                bias = values.normal(out, dtype=DTYPES[i % 3]) if i % 2 else None
                yield Sample(
                    f"{dtype} {batch} x {columns} -> {out}, groups of {group}",
                    (x, *weight, bias, group, columns),
                )

    return samples


def _gradients(bits: Bits) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        values = Values(bits, torch.device("cpu"))
        for asymmetric in (False, True)[: 2 if bits == 4 else 1]:
            x = values.normal(3, 40, dtype=torch.float64).requires_grad_()
            bias = values.normal(5, dtype=torch.float64).requires_grad_()
            weight = _weight(values, bits, 5, 40, 32, asymmetric)
            yield Sample(f"float64, zeros {asymmetric}", (x, *weight, bias, 32, 40))

    return samples


def _bf16(device: torch.device) -> Iterator[Sample]:
    values = Values(16, device)
    for i, (batch, out, columns) in enumerate(
        (
            (1, 9, 96),
            (2, 8, 160),
            (5, 17, 64),
            (16, 12, 320),
            (20, 8, 64),
            (3, 5, 33),
            (0, 3, 32),
            (1, 8, 2080),
        )
    ):
        x, weight = (values.normal(n, columns, dtype=torch.bfloat16) for n in (batch, out))
        bias = values.normal(out, dtype=DTYPES[i % 3]) if i % 2 else None
        yield Sample(f"{batch} x {columns} -> {out}", (x, weight, bias), free=frozenset({"weight.shape"}))


def _bf16_gradients() -> Iterator[Sample]:
    values = Values(16, torch.device("cpu"))
    x, weight, bias = (values.normal(*shape, dtype=torch.float64) for shape in ((2, 3, 7), (4, 7), (4,)))
    yield Sample("float64", (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))


def _dequantize(device: torch.device) -> Iterator[Sample]:
    values = Values(1, device)
    for bits in NAMES:
        for i, (_, out, columns, group) in enumerate(_SHAPES):
            weight = _weight(values, bits, out, columns, group, bits == 4 and i % 2 == 1)
            yield Sample(
                f"{bits} bits, {out} x {columns}, groups of {group}",
                (*weight, bits, group, columns, DTYPES[i % 3]),
            )


SAMPLES: Mapping[str, Samples] = {
    **{name: _linear(bits) for bits, name in NAMES.items()},
    "linear_bf16": _bf16,
    "linear_dequantize": _dequantize,
}
GRADIENTS: Mapping[str, Callable[[], Iterator[Sample]]] = {
    **{name: _gradients(bits) for bits, name in NAMES.items()},
    "linear_bf16": _bf16_gradients,
}
