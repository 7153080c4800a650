"""What rounding has lost and a rank still owes, unit by unit: saved, and cut anew with the world.

The interface, for whoever keeps errors of its own (a compressed optimizer's workers, for instance):

    errors = ErrorRows()                              # the name of its tensors in a checkpoint: "error/<fqn>"
    errors.connect(units, everyone, changes)          # owner.trainable, owner.everyone, owner.changes
    error = errors.of(unit)                           # [numel] fp32 of this rank, zeros at first: write it
    errors.clean(unit)                                # after a write that may have touched padding
    errors.state_dict(), .load_targets(saved), .load_state_dict(values)     # as a Route hands them on
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_core.ground.wire import Communicator
from ds_core.state.layout import Slot
from ds_core.state.saved import check_shapes
from ds_core.state.shard import ChangeGate, FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit


@dataclass(slots=True)
class _Rows:
    """Rows of another world that this rank has read, and will hand round: [rows * numel] by name."""

    world: int
    each: int  # rows that a rank reads, the last ones fewer
    parts: dict[str, Tensor] = field(default_factory=dict)


class ErrorRows:
    """One error per unit and rank: [numel] fp32, of the rank's whole contribution.

    Kept in fp32, whatever the gradients' dtype: what is sent adds up over steps to what was given only as far
    as the error is kept exactly. Rounded to bf16 it would lose up to 2^-9 of itself in every step, and where
    a gradient stays, in one direction: the sum would drift, which is what errors are kept against.

    A checkpoint holds `<name>/<parameter>` of shape [world, *shape], a row for each rank of `everyone`. At
    the same world every rank gets its row back, bit for bit. At another one every rank gets the mean of the
    rows, summed in fp32 in their order: what the mean over ranks lacks is then the same as before.
    """

    def __init__(self, name: str = "error") -> None:
        self.name = name
        self._errors: dict[str, Tensor] = {}  # by the unit's key
        self._units: Sequence[FlatUnit] = ()
        self._everyone: Communicator | None = None
        self._changes: ChangeGate | None = None
        self._rows: _Rows | None = None
        self._places: Sequence[tuple[str, Slot]] = ()  # of every parameter

    def connect(self, units: Sequence[FlatUnit], everyone: Communicator, changes: ChangeGate) -> None:
        """Zeros for these units, or what their parameters' errors were where units are only cut anew."""
        before = {slot.fqn: self._errors[unit_key][slot.start : slot.end] for unit_key, slot in self._places}
        self._errors = {}
        self._units, self._everyone, self._changes = list(units), everyone, changes
        for unit in units:
            error = torch.zeros(unit.layout.numel, dtype=torch.float32, device=unit.device)
            for slot in unit.layout.slots:
                if slot.fqn in before and before[slot.fqn].numel() == slot.numel:
                    error[slot.start : slot.end].copy_(before[slot.fqn])
            self._errors[unit.key] = error
        self._places = [(unit.key, slot) for unit in units for slot in unit.layout.slots]

    def of(self, unit: FlatUnit) -> Tensor:
        """This rank's error [numel], to be written; a checkpoint that still reads it is waited for."""
        if self._changes is None:
            raise RuntimeError("errors belong to units: connect them to an owner first")
        self._changes.open()
        return self._errors[unit.key]

    def clean(self, unit: FlatUnit) -> None:
        """Zero what lies between and behind the parameters: no checkpoint holds it, and no rank owes it."""
        zero_padding(unit, self._errors[unit.key])

    # -- checkpoints -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """This rank's row of every parameter."""
        return {f"{self.name}/{fqn}": shard for fqn, shard in self._own_rows()}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """This rank's row, or its part of the rows of another world; nothing where `saved` has no errors.

        Memory at another world: ceil(old / new) rows of every parameter until `load_state_dict`.
        Raises ValueError naming every parameter that is missing, unknown or of another shape.
        """
        prefix = f"{self.name}/"
        found = {name.removeprefix(prefix): info for name, info in saved.items() if name.startswith(prefix)}
        self._rows = None
        if not found:
            return {}
        mine = {slot.fqn: tuple(slot.shape) for _, slot in self._places if slot.numel}
        check_shapes(mine, {fqn: tuple(info.shape)[1:] for fqn, info in found.items()})
        worlds = {info.shape[0] for info in found.values()}
        if len(worlds) != 1:
            raise ValueError(f"the errors in the checkpoint are of several worlds, {sorted(worlds)}")
        comm = self._comm()
        (old,) = worlds
        if self._changes is not None:
            self._changes.open()
        if old == comm.world:
            return {prefix + fqn: shard for fqn, shard in self._own_rows()}
        each = -(-old // comm.world)
        first, last = min(old, comm.rank * each), min(old, (comm.rank + 1) * each)
        self._rows = _Rows(old, each)
        targets: dict[str, Tensor | FlatShard] = {}
        for unit_key, slot in self._places:
            part = self._errors[unit_key].new_empty((last - first) * slot.numel)
            self._rows.parts[slot.fqn] = part
            if part.numel():
                shape = torch.Size((old, *slot.shape))
                targets[prefix + slot.fqn] = FlatShard(part, shape, first * slot.numel)
        return targets

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """After the targets are filled. Collective where the errors are another world's."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        comm = self._comm()
        for unit_key, slot in self._places:
            mean = self._errors[unit_key][slot.start : slot.end].zero_()
            for row in range(rows.world):
                root, at = row // rows.each, (row % rows.each) * slot.numel
                mine = root == comm.rank
                given = rows.parts[slot.fqn][at : at + slot.numel] if mine else torch.empty_like(mean)
                comm.broadcast(given, root=root, about=f"errors of {slot.fqn}").wait()
                mean.add_(given)
            mean.div_(rows.world)

    def _comm(self) -> Communicator:
        if self._everyone is None:
            raise RuntimeError("errors belong to units: connect them to an owner first")
        return self._everyone

    def _own_rows(self) -> Iterator[tuple[str, FlatShard]]:
        comm = self._comm()
        for unit_key, slot in self._places:
            if slot.numel:
                local = self._errors[unit_key][slot.start : slot.end]
                yield (
                    slot.fqn,
                    FlatShard(local, torch.Size((comm.world, *slot.shape)), comm.rank * slot.numel),
                )


def zero_padding(unit: FlatUnit, flat: Tensor) -> None:
    """Zero the elements of a unit's flat [numel] that belong to no parameter."""
    at = 0
    for slot in sorted(unit.layout.slots, key=lambda slot: slot.start):
        flat[at : slot.start].zero_()
        at = slot.end
    flat[at:].zero_()
