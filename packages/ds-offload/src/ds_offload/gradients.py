"""Reduced gradients on their way out: room for them, the homes they leave for, and what is known of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.state.unit import FlatUnit
from ds_offload.home import Home
from ds_offload.moves import Moves


@dataclass(frozen=True, slots=True)
class _Coming:
    """What earlier backwards left, on its way back from a file, and as what it was seen when that began."""

    ticket: Ticket
    values: Tensor
    seen: tuple[int, int, int]


class KeptGradients:
    """What a store does with gradients that leave the device."""

    moves: Moves
    _homes: dict[str, Home]

    def __init__(self) -> None:
        self._norms: dict[str, tuple[Tensor, int]] = {}  # by unit: of its gradient, of which version of it
        self._kept: Counter[str] = Counter()  # by unit: gradients that left
        self._looks: Counter[str] = Counter()  # by unit: who reached for its master
        self._coming: dict[str, _Coming] = {}

    def stays(self, key: str, numel: int) -> bool:
        """Does this tensor stay on the device?"""
        raise NotImplementedError

    def make_home(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Home:
        """Room for a tensor off the device; what it holds is arbitrary."""
        raise NotImplementedError

    def foresee(self, unit: FlatUnit) -> None:
        """The unit's gradient is in its home, as far as one can tell the step's."""
        raise NotImplementedError

    def room(self, unit: FlatUnit) -> Tensor | None:
        """Memory for a reduced gradient that leaves the device; None when this unit's stays.

        It will be added to what earlier backwards left: where that is in a file it starts to come back now,
        beside the reduction.
        """
        if self.stays(f"{unit.key}/grad", unit.layout.shard_numel):
            return None
        room = torch.empty(unit.layout.shard_numel, dtype=unit.grad_dtype, device=unit.device)
        home = self._homes.get(f"{unit.key}/grad")
        if unit.gradient is not None and home is not None and _shows(unit.gradient, home) and home.file_bytes:
            values = torch.empty_like(room)
            ticket = self.moves.from_home(home, 0, values)
            self._coming[unit.key] = _Coming(ticket, values, self._seen(unit, unit.gradient))
        return room

    def keep(self, unit: FlatUnit, reduced: Tensor, *, final: bool) -> None:
        """The gradient leaves; what was there since the last step is added first, and the norm is noted.

        `final`: as far as one can tell it is the step's; updates may begin.
        """
        key = f"{unit.key}/grad"
        home = self._homes.get(key) or self.make_home(key, reduced.numel(), reduced.dtype, reduced.device)
        coming = self._coming.pop(unit.key, None)
        if coming is not None:
            coming.ticket.wait()
        if unit.gradient is not None and coming and coming.seen == self._seen(unit, unit.gradient):
            reduced += coming.values
        elif unit.gradient is not None:
            reduced += self._before(home, unit.gradient, reduced)
        norm = torch._foreach_norm([reduced], 2, dtype=torch.float32)[0]
        unit.gradient = home.tensor
        self._kept[unit.key] += 1

        def landed() -> None:
            self._norms[unit.key] = norm, home.tensor._version
            if final:
                self.foresee(unit)

        self.moves.to_home(home, 0, reduced, then=landed)

    def norm_of(self, unit: FlatUnit) -> Tensor:
        """The 2-norm of a unit's gradient, 0-dim fp32: noted when it left, unless it was written since."""
        assert unit.gradient is not None
        norm, version = self._norms.get(unit.key, (None, -1))
        home = self._homes.get(f"{unit.key}/grad")
        same = home is not None and _shows(unit.gradient, home)
        if norm is not None and same and unit.gradient._version == version:
            return norm
        return torch._foreach_norm([unit.gradient], 2, dtype=torch.float32)[0]

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

    def _seen(self, unit: FlatUnit, gradient: Tensor) -> tuple[int, int, int]:
        return self._kept[unit.key], gradient._version, gradient.data_ptr()

    def _before(self, home: Home, gradient: Tensor, like: Tensor) -> Tensor:
        """What earlier backwards left."""
        if not _shows(gradient, home):
            return gradient.to(like.device)  # put there by hand
        if home.file_bytes == 0 and like.device.type == "cpu":
            return home.tensor
        found = torch.empty_like(like)
        self.moves.from_home(home, 0, found).wait()
        return found


def _shows(gradient: Tensor, home: Home) -> bool:
    return gradient.data_ptr() == home.tensor.data_ptr()
