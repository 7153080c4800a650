"""How far apart rounding alone may put two right implementations; what the bounds of ops are made of."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24  # of fp32: a rounding moves a number by at most this much of itself


def once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Two roundings of nearly the same number to a dtype: each half a step of the dtype away, in double."""
    info = torch.finfo(dtype)
    return value.double().abs() * info.eps + info.smallest_normal * info.eps
