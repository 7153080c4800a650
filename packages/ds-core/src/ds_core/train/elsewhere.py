"""What a store offers that keeps masters and states elsewhere: their update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece


class Elsewhere(Protocol):
    """Updates the units whose masters or states live elsewhere than their parameters (a store's `away`).

    Their pieces never get a `.grad`, so the optimizer's own step, which comes after `run`, passes them over.
    """

    def has(self, unit: FlatUnit) -> bool:
        """Is this unit updated here, and not by the optimizer's own step?"""
        ...

    def run(self) -> frozenset[str]:
        """Step every unit that has a gradient; the keys of those whose shard is up to date afterwards."""
        ...

    def norms(self, units: Sequence[FlatUnit]) -> list[Tensor]:
        """The 2-norm of each unit's gradient, 0-dim fp32."""
        ...

    def expect(self, factor: float) -> None:
        """What the next step will probably scale gradients by: its loss scale undone, nothing clipped."""
        ...

    def scale(self, factor: Tensor | float) -> None:
        """Gradients count times this in the next `run`."""
        ...

    def room(self, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
        """Where a state of a piece lives, in its shape; what is there at first is arbitrary."""
        ...

    def forget(self) -> None:
        """Gradients were dropped, and what they were to be scaled by."""
        ...

    def cut_anew(self) -> None:
        """The owner has other units."""
        ...
