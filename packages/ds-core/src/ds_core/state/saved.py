"""A model's units and buffers by the names under which checkpoints hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ds_core.ground.wire import Communicator
from ds_core.state.parked import Parked
from ds_core.state.replan import Replanner
from ds_core.state.shard import ChangeGate, FlatShard, Json, SavedTensor
from ds_core.state.store import Store
from ds_core.state.unit import FlatUnit, Whole


class SavedUnits:
    """What an owner of units is to checkpoints: the `Saveable` part of it."""

    model: nn.Module
    store: Store
    units: list[FlatUnit]
    comm: Communicator
    replicas: Communicator
    sharded: bool
    parked: Parked
    changes: ChangeGate
    replanner: Replanner

    def settle(self) -> None:
        """Everything that is on its way has arrived."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Drop all gradients, reduced or not."""
        raise NotImplementedError

    def publish_unit(self, unit: FlatUnit) -> None:
        """The unit's `local` changed: bring its whole copy up to date, or forget it. Collective."""
        raise NotImplementedError

    def written_part(self, unit: FlatUnit) -> range:
        """Elements of the unit's shard that this rank writes: its part of what several ranks hold."""
        numel, copies = unit.layout.shard_numel, self.replicas if self.sharded else self.comm
        each = -(-numel // copies.world)
        return range(min(numel, each * copies.rank), min(numel, each * (copies.rank + 1)))

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """Parameters (masters where there are any) as this rank's shards, buffers whole, tied names."""
        self.parked.need("a checkpoint", "param", "master")
        self.replanner.before_drain()
        self.settle()
        state: dict[str, Tensor | FlatShard | Json] = {}
        for unit in self.units:
            part = self.written_part(unit)
            state |= flat_shards(unit, unit.values().detach(), part, let_go=paged(self.store, unit))
        # Buffers may change in any forward, so a checkpoint that copies in the background gets copies.
        state |= {name: buffer.detach().clone() for name, buffer in saved_buffers(self.model).items()}
        state["tied"] = tied_names(self.model)
        return state

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Masters, frozen shards and buffers, after every name and shape has been compared."""
        self.parked.need("loading a checkpoint", "param", "master")
        self.replanner.before_drain()
        shapes = {slot.fqn: slot.shape for unit in self.units for slot in unit.layout.slots}
        shapes |= {name: buffer.shape for name, buffer in saved_buffers(self.model).items()}
        check_shapes(shapes, {name: info.shape for name, info in saved.items()})
        self.changes.open()
        for unit in self.units:
            with contextlib.suppress(OSError):  # a shard that cannot be read any more: it is replaced
                if unit.state is Whole.COMING:
                    unit.arrive(unit.ticket)
        targets: dict[str, Tensor | FlatShard] = {}
        for unit in self.units:
            targets |= flat_shards(unit, unit.values().detach(), let_go=paged(self.store, unit))
        return targets | saved_buffers(self.model)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """After the targets are filled: refresh every copy that is not the master. Collective."""
        self.zero_grad()
        for unit in self.units:
            unit.refresh_local()
            self.publish_unit(unit)
        self.settle()


def paged(store: Store, unit: FlatUnit) -> Callable[[], object] | None:
    """What lets go of the pages of a unit's values, where a file holds them."""
    key = f"{unit.key}/master" if unit.trainable else unit.shard_key
    return None if store.away is None or key is None else store.away.paged(key)


def flat_shards(
    unit: FlatUnit,
    values: Tensor,
    part: range | None = None,
    *,
    let_go: Callable[[], object] | None = None,
) -> dict[str, FlatShard]:
    """`values` [shard_numel] of a unit as shards by parameter name, cut to `part` of the shard."""
    found = {}
    part = range(unit.layout.shard_numel) if part is None else part
    for overlap in unit.layout.overlaps(unit.rank):
        low, high = max(overlap.local[0], part.start), min(overlap.local[1], part.stop)
        if low < high:
            begin = overlap.begin + low - overlap.local[0]
            found[overlap.slot.fqn] = FlatShard(values[low:high], overlap.slot.shape, begin, let_go)
    return found


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong into a checkpoint: those registered as persistent."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of a parameter -> the name it is saved under."""
    first: dict[int, str] = {}
    tied = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            tied[name] = first[id(param)]
    return tied


def check_shapes(mine: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError listing every name that is missing, unknown or of another shape, with both shapes."""
    faults = [
        f"  {name}: in the model {tuple(mine[name])}, not in the checkpoint"
        for name in mine
        if name not in saved
    ]
    faults += [
        f"  {name}: in the checkpoint {tuple(saved[name])}, not in the model"
        for name in saved
        if name not in mine
    ]
    faults += [
        f"  {name}: in the model {tuple(mine[name])}, in the checkpoint {tuple(saved[name])}"
        for name in mine
        if name in saved and tuple(mine[name]) != tuple(saved[name])
    ]
    if faults:
        shown = "\n".join(faults[:20]) + (f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ValueError(
            f"the checkpoint is of another model, {len(faults)} tensors differ:\n{shown}\n"
            "build the model that was saved, or load the checkpoint it was saved to; nothing was changed"
        )
