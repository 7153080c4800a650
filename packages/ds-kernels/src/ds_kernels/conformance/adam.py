"""What the Adam op is tried with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product

import torch

from ds_kernels.conformance.sample import LONG, SIZES, Sample, Samples, Values
from ds_kernels.native import DTYPES
from ds_kernels.ops.adam import NAME, AdamHyper

_HYPERS = {
    "AdamW": AdamHyper(lr=1e-2, weight_decay=0.1),
    "L2": AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True),
}


def _steps(device: torch.device) -> Iterator[Sample]:
    for param, grad, copy in product(DTYPES, DTYPES, (None, *DTYPES)):
        values = Values(1, device)
        sizes = (*SIZES, LONG) if param == grad == torch.float32 else SIZES
        for name, hyper in _HYPERS.items():
            lists = [
                [values.normal(n, dtype=dtype) for n in sizes]
                for dtype in (param, grad, torch.float32, torch.float32)
            ]
            lists[3] = [v.square() for v in lists[3]]
            copies = [values.normal(n, dtype=copy) for n in sizes] if copy else []
            coef = torch.tensor(0.37) if name == "AdamW" else None
            yield Sample(
                f"{name} {param} {grad} copy {copy}",
                (*lists, copies, list(range(1, len(sizes) + 1))),
                {**asdict(hyper), "grad_coef": coef},
                free=frozenset({"grad_coef.shape", "grad_coef.dtype", "grad_coef.device", "grads.alias"}),
            )


SAMPLES: Mapping[str, Samples] = {NAME: _steps}
