"""One call of an op to try its implementations with, and the shapes that find mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Nothing, around every vector width (1, 4, 8, 16, 32), and past the length of a chunk or a block.
SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 1000)
LONG = 32769


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. `free` names what cannot be wrong about an argument (see wrong.py), as
    "name.shape", "name.dtype", "name.device", "name.layout", "name.value", "name.alias", or "alias" for all.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()


# What a family's module gives for each op: fresh samples, the same values at every call.
Samples = Callable[[torch.device], Iterator[Sample]]


class Values:
    """Random tensors, the same for the same seed, of any dtype, on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Standard normal times `scale`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.randn(shape, generator=self._generator, dtype=wide) * scale
        return values.to(dtype).to(self.device)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)
