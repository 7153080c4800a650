"""What Newton-Schulz orthogonalisation is tried with: few steps, of which the bound still says something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch

from ds_kernels.conformance.sample import Sample, Samples, Values
from ds_kernels.ops.muon import COEFFICIENTS, METHODS, NAME

SHAPES = ((0, 5), (1, 1), (7, 3), (3, 130, 140), (150, 131), (2, 130, 130))


def _orthogonalise(device: torch.device) -> Iterator[Sample]:
    values = Values(3, device)
    for shape, method in product(SHAPES, METHODS):
        for steps, dtype in ((1, torch.float32), (3, torch.float64), (1, torch.bfloat16)):
            a, b, c = COEFFICIENTS
            numbers = {"steps": steps, "a": a, "b": b, "c": c, "eps": 1e-7, "method": method, "dtype": dtype}
            x = values.normal(*shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            yield Sample(f"{shape} {method} {dtype}", (x,), numbers, free=frozenset({"x.device"}))


SAMPLES: Mapping[str, Samples] = {NAME: _orthogonalise}
