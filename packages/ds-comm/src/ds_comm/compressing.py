"""What a route of momenta asks of its optimizer, and where in a unit which of its groups holds."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import attached


class Mode(enum.Enum):
    """What the gradients of the step under way become."""

    PLAIN = "their mean, as ever"
    SIGNS = "the mean of all ranks' momenta, as signs and scales"
    LOCAL = "this rank's own momentum: nothing travels"


class Compressing(Protocol):
    """What the route asks of its optimizer."""

    param_groups: list[dict[str, Any]]
    preconditions: bool  # may momenta be sent in units of the variance?

    @property
    def mode(self) -> Mode:
        """Of the step under way: the same on every rank."""
        ...

    def settings(self) -> Mapping[str, Json]:
        """What ranks must agree on."""
        ...

    def refuse(self, owner: FlatOwner) -> None:
        """Raises ValueError for an owner that it cannot serve."""
        ...

    def momentum(self, piece: Piece) -> Tensor:
        """exp_avg of a piece, fp32, zeros at first."""
        ...

    def variance(self, piece: Piece) -> Tensor:
        """exp_avg_sq of a piece."""
        ...

    def receive_(self, piece: Piece, momentum: Tensor, *, again: bool) -> None:
        """The piece's new momentum, flat; `again`: what is to be added to it."""
        ...

    def before_sending_(self, unit: FlatUnit, value: Tensor, *, again: bool) -> None:
        """This rank's momentum [numel and more] becomes what is sent."""
        ...

    def after_receiving_(self, unit: FlatUnit, value: Tensor, begin: int) -> None:
        """What was sent becomes momentum; `value` holds elements of the unit from `begin` on."""
        ...

    def counters(self) -> Json: ...
    def load_counters(self, values: Json) -> None: ...


class GroupRuns:
    """Whose settings hold where in a unit, looked up again when the optimizer's parameters are other ones."""

    def __init__(self, optimizer: Compressing) -> None:
        self._optimizer = optimizer
        self._of: object = None
        self._runs: dict[str, list[tuple[int, int, int]]] = {}
        self._pieces: dict[str, list[Piece]] = {}

    def runs(self, unit: FlatUnit) -> Sequence[tuple[int, int, dict[str, Any]]]:
        """(first element, one past the last, group), in order."""
        self._look()
        groups = self._optimizer.param_groups
        return [(start, end, groups[number]) for start, end, number in self._runs.get(unit.key, ())]

    def pieces(self, unit: FlatUnit) -> Sequence[Piece]:
        """What of the unit this rank updates."""
        self._look()
        return self._pieces.get(unit.key, ())

    def _look(self) -> None:
        sharded = attached(self._optimizer)  # type: ignore[arg-type]
        held = sharded.held
        if held.pieces is self._of:
            return
        self._of, self._pieces = held.pieces, {}
        for piece in held.trained:
            self._pieces.setdefault(piece.unit.key, []).append(piece)
        found: dict[str, list[tuple[int, int, int]]] = {}
        for number, params in enumerate(held.members):
            for param in params:
                unit, index = sharded.owner.place(param)
                slot = unit.layout.slots[index]
                if slot.numel:
                    found.setdefault(unit.key, []).append((slot.start, slot.end, number))
        self._runs = {key: _joined(sorted(runs)) for key, runs in found.items()}


def _joined(runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one group as one run."""
    found: list[tuple[int, int, int]] = []
    for start, end, number in runs:
        if found and found[-1][1:] == (start, number):
            start = found.pop()[0]
        found.append((start, end, number))
    return found
