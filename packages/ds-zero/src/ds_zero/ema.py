"""An exponential moving average of the masters, kept as shards and updated after every optimizer step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.owner import FlatOwner, owner_of
from ds_core.state.saved import check_shapes, flat_shards
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.store import DeviceStore, Store
from ds_core.state.unit import FlatUnit, refuse_lost_writes
from ds_core.train.optim import ShardedOptimizer, attached, optimizers_of


class EMA:
    """average += (1 - decay) * (master - average), on this rank's shards, after each step that was taken.

    It starts as a copy of the masters. A step that is skipped (overflow) never reaches the optimizer, so it
    does not count. `decay` may be a function of the number of updates so far, for a warm-up. `after` is the
    optimizer whose steps are followed; only a model with several needs to be told. `store` says where the
    averages live (None: the device). Frozen parameters and buffers have no average: they are used as they
    are. Dropping the object ends it.

    A part of a checkpoint like the owner itself: cut by parameter name, read back at any world and stage.
    Raises LookupError for a model without a sharded optimizer, ValueError for several without `after`, for a
    decay outside [0, 1), and for masters below 32 bits, in which an average stands still.
    """

    def __init__(
        self,
        model: nn.Module | FlatOwner,
        decay: float | Callable[[int], float] = 0.999,
        *,
        after: Optimizer | ShardedOptimizer | None = None,
        store: Store | None = None,
    ) -> None:
        self.owner = model if isinstance(model, FlatOwner) else _only_owner(model)
        self.decay = decay
        self.updates = 0
        self._applied = False
        self._store: Store = store or DeviceStore()
        self._units: list[FlatUnit] = []
        _factor(decay, 0)  # says at once what is wrong with a number
        optimizer = attached(after) if after is not None else _only_optimizer(self.owner)
        self._follow_units()
        found = weakref.ref(self)  # the optimizer must not keep what nobody else has

        def update(*_: Any) -> None:
            ema = found()
            if ema is not None:
                ema.update()

        optimizer.optimizer.register_step_post_hook(update)

    def update(self) -> None:
        """Take the masters in, once: what the optimizer's hook does, and anyone may."""
        self._refuse_applied("update the averages")
        self.owner.changes.open()
        self._follow_units()
        weight = 1.0 - _factor(self.decay, self.updates)
        with torch.no_grad():
            for unit in self._units:
                with unit.master() as master, self._average(unit) as average:
                    average.tensor.lerp_(master.tensor, weight)
                    average.dirty = True
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards, bit for bit.

        Everything sees them: forward, `full_tensor`, `state_dict()`, and a checkpoint or export of the model.
        Masters and averages change places unit by unit, so this needs no second copy of either. An optimizer
        step inside raises RuntimeError and changes nothing. Collective: every rank enters and leaves.
        """
        self._refuse_applied("apply the averages a second time")
        refuse_lost_writes(self.owner.units)
        handles = [
            sharded.optimizer.register_step_pre_hook(_refuse_step) for sharded in optimizers_of(self.owner)
        ]
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._swap()
            self._applied = False
            for handle in handles:
                handle.remove()

    def _swap(self) -> None:
        """Masters <-> averages, and every copy of the masters with them. Collective."""
        owner = self.owner
        owner.changes.open()
        owner.settle()
        with torch.no_grad():
            for unit in self._units:
                with unit.master() as master, self._average(unit) as average:
                    kept = master.tensor.clone()
                    master.tensor.copy_(average.tensor)
                    average.tensor.copy_(kept)
                    master.dirty = average.dirty = True
                unit.refresh_local()
                torch.autograd.graph.increment_version(unit.params)  # a graph from before is refused
                unit.note_versions()
                owner.publish_unit(unit)
        owner.settle()

    def _average(self, unit: FlatUnit) -> Any:
        return self._store.lease(f"{unit.key}/average", unit.device)

    def _follow_units(self) -> None:
        """Averages for units that have none yet, starting from their masters."""
        for unit in self.owner.trainable:
            if unit in self._units:
                continue
            if unit.master_dtype.itemsize < 4:
                raise ValueError(
                    f"the masters of {unit.key} are {unit.master_dtype}, too coarse for an average with a "
                    f"decay near 1: shard with dtype={unit.master_dtype} over an fp32 model, which keeps "
                    "fp32 masters"
                )
            with unit.master() as master:
                self._store.create(f"{unit.key}/average", master.tensor.detach().clone())
            self._units.append(unit)

    def _refuse_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"cannot {what} inside `with ema.applied():`; leave the block first")

    # -- checkpoints ---------------------------------------------------------------------------------------

    def before_next_change(self, fn: Callable[[], None]) -> None:
        """Averages change right after masters do."""
        self.owner.before_next_change(fn)

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """`<parameter>` as shards of the averages, and the number of updates."""
        self._refuse_applied("save the averages")
        state: dict[str, Tensor | FlatShard | Json] = {"updates": self.updates}
        for unit in self._units:
            with self._average(unit) as average:
                state |= flat_shards(unit, average.tensor, self.owner.written_part(unit))
        return state

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """The averages' own memory, after every name and shape has been compared."""
        self._refuse_applied("load averages")
        self._follow_units()
        shapes = {slot.fqn: slot.shape for unit in self._units for slot in unit.layout.slots}
        check_shapes(shapes, {name: info.shape for name, info in saved.items()})
        self.owner.changes.open()
        targets: dict[str, Tensor | FlatShard] = {}
        for unit in self._units:
            with self._average(unit) as average:
                average.dirty = True
                targets |= flat_shards(unit, average.tensor)
        return targets

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """The number of updates."""
        self.updates = int(values["updates"])


def _factor(decay: float | Callable[[int], float], updates: int) -> float:
    value = decay(updates) if callable(decay) else decay
    if not 0.0 <= value < 1.0:
        raise ValueError(f"decay must be at least 0 and below 1, got {value!r}; 0.999 is usual")
    return value


def _only_owner(model: nn.Module) -> FlatOwner:
    owners = list({id(owner): owner for owner in map(owner_of, model.parameters())}.values())
    if len(owners) != 1:
        raise ValueError(f"the model's parameters have {len(owners)} owners; make one EMA for each")
    return owners[0]


def _only_optimizer(owner: FlatOwner) -> ShardedOptimizer:
    found = optimizers_of(owner)
    if not found:
        raise LookupError("no optimizer steps on this model yet: shard(model, optimizer, ...) first")
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} optimizers step on this model: say which one is the last of a step with after=..."
        )
    return found[0]


def _refuse_step(*_: Any) -> None:
    raise RuntimeError(
        "an optimizer step inside `with ema.applied():` would train the averaged weights; "
        "leave the block first"
    )
