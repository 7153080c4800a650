"""An exponential moving average of the masters, kept as shards and updated after every optimizer step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.owner import FlatOwner, owner_of
from ds_core.state.replan import Place
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
    are. That of a parameter which is frozen later rests, unsaved, until it trains again; a new one's starts
    at its value. Dropping the object ends it.

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
        self._known: dict[FlatUnit, set[int]] = {}  # unit -> slots with an average; of frozen ones it rests
        _factor(decay, 0)  # says at once what is wrong with a number
        optimizer = attached(after) if after is not None else _only_optimizer(self.owner)
        self._follow_units()
        self.owner.replanner.followers.append(weakref.ref(self))
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
        weight, training = 1.0 - _factor(self.decay, self.updates), self._training()
        with torch.no_grad():
            for unit in self.owner.trainable:
                with unit.master() as master, self._average(unit) as average:
                    for part in _parts(unit, training):
                        average.tensor[part].lerp_(master.tensor[part], weight)
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
        training = self._training()
        self._swap(training)
        self._applied = True
        try:
            yield
        finally:
            self._swap(training)
            self._applied = False
            for handle in handles:
                handle.remove()

    def _training(self) -> set[int]:
        """Ids of the parameters that train now: one frozen since the last step may still be in its unit."""
        return {id(p) for unit in self.owner.trainable for p in unit.params if p.requires_grad}

    def _swap(self, params: Set[int]) -> None:
        """Masters <-> averages, and every copy of the masters with them. Collective."""
        owner = self.owner
        owner.changes.open()
        owner.settle()
        with torch.no_grad():
            for unit in self.owner.trainable:
                with unit.master() as master, self._average(unit) as average:
                    for part in _parts(unit, params):
                        kept = master.tensor[part].clone()
                        master.tensor[part].copy_(average.tensor[part])
                        average.tensor[part].copy_(kept)
                    master.dirty = average.dirty = True
                unit.refresh_local()
                torch.autograd.graph.increment_version(unit.params)  # a graph from before is refused
                unit.note_versions()
                owner.publish_unit(unit)
        owner.settle()

    def _average(self, unit: FlatUnit) -> Any:
        return self._store.lease(f"{unit.key}/average", unit.device)

    def _follow_units(self) -> None:
        """Averages for parameters that have none yet, starting from their masters."""
        for unit in self.owner.trainable:
            if unit.master_dtype.itemsize < 4:
                raise ValueError(
                    f"the masters of {unit.key} are {unit.master_dtype}, too coarse for an average with a "
                    f"decay near 1: shard with dtype={unit.master_dtype} over an fp32 model, which keeps "
                    "fp32 masters"
                )
            known = self._room_for(unit, unit.master_dtype)
            with unit.master() as master, self._average(unit) as average:
                for overlap in unit.layout.overlaps(unit.rank):
                    if overlap.index not in known:
                        part = slice(*overlap.local)
                        average.tensor[part].copy_(master.tensor[part].detach())
                        average.dirty = True
            known.update(range(len(unit.params)))

    def _room_for(self, unit: FlatUnit, dtype: torch.dtype) -> set[int]:
        """Memory for a unit's averages; the slots that have one."""
        if unit not in self._known:
            empty = torch.zeros(unit.layout.shard_numel, dtype=dtype, device=unit.device)
            self._store.create(f"{unit.key}/average", empty)
            self._known[unit] = set()
        return self._known[unit]

    # -- units are cut anew (ds_core.state.replan.Follower) ------------------------------------------------

    def regrouped(self) -> bool:
        """It is for whatever trains."""
        return False

    def describe(self) -> Json:
        """Every rank has taken the same steps."""
        return ["average", self.updates]

    def leave(self, units: Sequence[FlatUnit]) -> None:
        """All ranks know the same, so there is nothing to agree on."""
        self._refuse_applied("change the model's parameters")

    def shards_of(self, unit: FlatUnit) -> Sequence[tuple[str, Tensor]]:
        """A unit's averages."""
        if unit not in self._known:
            return []
        with self._average(unit) as average:
            return [("average", average.tensor)]

    def put(self, name: str, old: Place, new: Place, value: Tensor) -> None:
        """This rank's part of one parameter's average."""
        if old.index not in self._known.get(old.unit, ()):
            return
        dtype = new.unit.master_dtype if new.unit.trainable else value.dtype
        self._room_for(new.unit, dtype).add(new.index)
        part = new.unit.layout.overlap(new.unit.rank, new.index)
        if part is not None:
            low, high = part.local
            with self._average(new.unit) as average:
                average.tensor[low:high].copy_(value[part.begin : part.begin + high - low])
                average.dirty = True

    def cut_anew(self, stayed: Set[int]) -> None:
        """Forget units that went; what is new starts from its masters."""
        for unit in [unit for unit in self._known if unit not in self.owner.units]:
            self._store.drop(f"{unit.key}/average")
            del self._known[unit]
        self._follow_units()

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
        for unit in self.owner.trainable:
            with self._average(unit) as average:
                state |= flat_shards(unit, average.tensor, self.owner.written_part(unit))
        return state

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """The averages' own memory, after every name and shape has been compared."""
        self._refuse_applied("load averages")
        shapes = {slot.fqn: slot.shape for unit in self.owner.trainable for slot in unit.layout.slots}
        check_shapes(shapes, {name: info.shape for name, info in saved.items()})
        self.owner.changes.open()
        targets: dict[str, Tensor | FlatShard] = {}
        for unit in self.owner.trainable:
            with self._average(unit) as average:
                average.dirty = True
                targets |= flat_shards(unit, average.tensor)
        return targets

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """The number of updates."""
        self.updates = int(values["updates"])


def _parts(unit: FlatUnit, params: Set[int]) -> list[slice]:
    """What this rank's shard holds of some parameters."""
    if all(id(param) in params for param in unit.params):
        return [slice(None)]
    overlaps = unit.layout.overlaps(unit.rank)
    return [slice(*overlap.local) for overlap in overlaps if id(unit.params[overlap.index]) in params]


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
