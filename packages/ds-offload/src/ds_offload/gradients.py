"""Reduced gradients on their way out: room for them, the homes they leave for, and what is known of them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ds_core.state.precision import norms_of
from ds_core.state.store import HasGradient
from ds_core.state.unit import FlatUnit
from ds_offload.home import Home
from ds_offload.moves import Moves


class KeptGradients:
    """What a store does with gradients that leave the device."""

    moves: Moves
    _homes: dict[str, Home]

    def __init__(self) -> None:
        self._norms: dict[str, tuple[Tensor, int]] = {}  # by unit: of its gradient, of which version of it
        self._kept: Counter[str] = Counter()  # by unit: gradients that left
        self._looks: Counter[str] = Counter()  # by unit: who reached for its master

    def stays(self, key: str, numel: int) -> bool:
        """Does this tensor stay on the device?"""
        raise NotImplementedError

    def make_home(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Home:
        """Room for a tensor off the device; what it holds is arbitrary."""
        raise NotImplementedError

    def foresee(self, unit: HasGradient) -> None:
        """The unit's gradient is in its home, as far as one can tell the step's."""
        raise NotImplementedError

    def room(self, unit: HasGradient) -> Tensor | None:
        """Memory for a gradient before it leaves, with what the unit has so far; None when it stays.

        It stays wherever the unit is updated on the device, which needs it there. The reduction adds to the
        room in the arithmetic in which gradients that stay are added up.
        """
        if any(self.stays(f"{unit.key}/{kind}", unit.layout.shard_numel) for kind in ("grad", "master")):
            return None
        room = torch.empty(unit.layout.shard_numel, dtype=unit.grad_dtype, device=unit.device)
        home = self._homes.get(f"{unit.key}/grad")
        if home is not None:
            home.settle()  # what left before, and was dropped or replaced, must not arrive after what comes
        if unit.gradient is None:
            return room
        if home is None or not _shows(unit.gradient, home):
            return room.copy_(unit.gradient)  # put there by hand
        self.moves.settle()
        self.moves.from_home(home, 0, room).wait()
        return room

    def keep(self, unit: HasGradient, reduced: Tensor, *, final: bool) -> None:
        """The gradient, all of it, leaves, and its norm is noted.

        `final`: as far as one can tell it is the step's; updates may begin.
        """
        key = f"{unit.key}/grad"
        home = self._homes.get(key) or self.make_home(key, reduced.numel(), reduced.dtype, reduced.device)
        (norm,) = norms_of([reduced])
        unit.gradient = home.tensor
        self._kept[unit.key] += 1

        def landed() -> None:
            self._norms[unit.key] = norm, home.tensor._version
            if final:
                self.foresee(unit)

        self.moves.to_home(home, 0, reduced, then=landed)

    def norm_of(self, unit: HasGradient) -> Tensor:
        """The 2-norm of a unit's gradient, 0-dim fp32: noted when it left, unless it was written since."""
        assert unit.gradient is not None
        norm, version = self._norms.get(unit.key, (None, -1))
        home = self._homes.get(f"{unit.key}/grad")
        same = home is not None and _shows(unit.gradient, home)
        if norm is not None and same and unit.gradient._version == version:
            return norm
        return norms_of([unit.gradient])[0]

    def sight(self, unit: FlatUnit) -> tuple[int, int]:
        """(how often the unit's gradient was kept, how often its master was reached for)."""
        return self._kept[unit.key], self._looks[unit.key]

    def hand_over(self, unit: FlatUnit) -> None:
        """The gradient's home goes to a late update; what the one before read is for the next gradient."""
        key, late = f"{unit.key}/grad", f"{unit.key}/late grad"
        free = self._homes.pop(late, None)
        self._homes[late] = self._homes.pop(key)
        if free is not None:
            self._homes[key] = free


def _shows(gradient: Tensor, home: Home) -> bool:
    return gradient.data_ptr() == home.tensor.data_ptr()
