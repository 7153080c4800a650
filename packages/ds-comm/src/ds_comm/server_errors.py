"""What the second rounding has lost: each rank's own chunk of the mean, cut anew with units and world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_comm.signs_wire import gaps, plan_chunks
from ds_core.ground.wire import Communicator
from ds_core.state.layout import BucketLayout
from ds_core.state.saved import check_shapes
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit

_PREFIX = "server/"


class ServerErrors:
    """One error per unit, [chunk] fp32 on the rank that sums the chunk: a vector over all of the unit's
    elements, of which every rank holds a part. A checkpoint holds it as `server/<parameter>`, in the
    parameter's shape, so another world cuts the very same values.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._layouts: dict[str, BucketLayout] = {}  # by the unit's key
        self._errors: dict[str, Tensor] = {}

    def connect(self, units: Sequence[FlatUnit]) -> None:
        """Zeros for these units, or what was there of their parameters. Collective where there was."""
        before = self._whole()
        self._layouts = {unit.key: plan_chunks(unit.layout, self._comm.world) for unit in units}
        self._errors = {}
        for unit in units:
            layout = self._layouts[unit.key]
            error = torch.zeros(layout.shard_numel, device=unit.device)
            for part in layout.overlaps(self._comm.rank):
                old = before.get(part.slot.fqn)
                if old is not None and old.numel() == part.slot.numel:
                    low, high = part.local
                    error[low:high].copy_(old[part.begin : part.begin + high - low])
            self._errors[unit.key] = error

    def _whole(self) -> dict[str, Tensor]:
        """Every parameter's error, flat. Collective, in the order of the units they were."""
        found: dict[str, Tensor] = {}
        for key, layout in self._layouts.items():
            flat = self._errors[key].new_empty(layout.numel)
            self._comm.all_gather(flat, self._errors[key], about=f"server errors of {key}").wait()
            found |= {slot.fqn: flat[slot.start : slot.end] for slot in layout.slots}
        return found

    def of(self, unit: FlatUnit) -> Tensor:
        """This rank's error [chunk], to be written."""
        return self._errors[unit.key]

    def clean(self, unit: FlatUnit) -> None:
        """Zero what belongs to no parameter."""
        layout, error = self._layouts[unit.key], self._errors[unit.key]
        low = self._comm.rank * layout.shard_numel
        for gap in gaps(layout):
            start, stop = max(gap.start - low, 0), min(gap.stop - low, layout.shard_numel)
            if start < stop:
                error[start:stop].zero_()

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        return dict(self._shards())

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Raises ValueError naming every parameter that is missing, unknown or of another shape."""
        theirs = {
            name.removeprefix(_PREFIX): tuple(info.shape)
            for name, info in saved.items()
            if name.startswith(_PREFIX)
        }
        slots = [slot for layout in self._layouts.values() for slot in layout.slots if slot.numel]
        check_shapes({slot.fqn: tuple(slot.shape) for slot in slots}, theirs)
        return dict(self._shards())

    def _shards(self) -> dict[str, FlatShard]:
        found = {}
        for key, layout in self._layouts.items():
            for part in layout.overlaps(self._comm.rank):
                local = self._errors[key][slice(*part.local)]
                found[f"{_PREFIX}{part.slot.fqn}"] = FlatShard(local, part.slot.shape, part.begin)
        return found
