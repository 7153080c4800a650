"""Who owns every parameter's bytes: the flat runtime that all stages share, and stage 0 itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ds_core.ground.accelerator import hand_back_freed_memory, keep_freed_memory
from ds_core.ground.mesh import Mesh, Topology
from ds_core.ground.wire import Codec
from ds_core.limits import refuse
from ds_core.state.factory import UnitFactory, flatten
from ds_core.state.forwards import swapped_in
from ds_core.state.groups import Across, DataGroups
from ds_core.state.hooks import OwnerHooks, dtype_of, in_backward, outside_of_graphs
from ds_core.state.layout import Cut
from ds_core.state.parked import Parkable, Parked
from ds_core.state.precision import Precision
from ds_core.state.published import PublishedUnits
from ds_core.state.reduce import GradReducer
from ds_core.state.replan import Replanner
from ds_core.state.route import GradientRoute, ParamRoute, Route
from ds_core.state.saved import SavedUnits
from ds_core.state.shard import ChangeGate
from ds_core.state.store import DeviceStore, Store
from ds_core.state.unit import FlatUnit
from ds_core.state.units import LEAF_MARK, Split, UnitPlan

# parameter -> its owner: the one table that lets `full_tensor(param)` and friends start from a parameter.
# Weak on both sides: an owner holds its parameters, and the model's hooks hold the owner.
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def owner_of(param: Tensor) -> FlatOwner:
    """The owner that a parameter was handed to. Raises LookupError for an ordinary parameter."""
    found = _OWNERS.get(param)  # type: ignore[no-untyped-call]
    owner = found() if found is not None else None
    if owner is None:
        raise LookupError("this tensor is no parameter of a sharded model; shard the model first")
    assert isinstance(owner, FlatOwner)
    return owner


class FlatOwner(PublishedUnits, SavedUnits, Parkable):
    """Parameters in flat units, gradients through one reducer, in place on the user's own module.

    `sharded`: each rank keeps 1/world of masters, gradients and optimizer state along the data axis.
    Subclasses say what stays whole (`keep_whole`, `whole_grads`) and how stale copies are refreshed.
    Collective: construction broadcasts rank 0's parameters and buffers, so ranks need no common seed.
    Raises ValueError for what `ds_core.limits` says does not go together.
    """

    stage = 0
    extra_features: frozenset[str] = frozenset()  # of ds_core.limits, beyond what every owner sees by itself

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh | None,
        *,
        sharded: bool,
        whole_grads: bool,
        precision: Precision,
        store: Store | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.mesh = mesh or Topology().build()
        self.device = self.mesh.accelerator.device
        self.store: Store = store or DeviceStore()
        self.sharded = sharded
        self.precision = precision
        settings = _Options(**options)
        away = self.store.away
        keep = keep_freed_memory if away is None else hand_back_freed_memory
        keep(self.mesh.accelerator)
        self.features = (
            self.extra_features | self.store.features | _features(model, precision, settings, self.mesh)
        )
        refuse(self.stage, self.features)
        self.options, self.given = settings, frozenset(options)  # for `explain`
        self.cut = settings.cut
        self._groups = groups = DataGroups(self.mesh, across=settings.across if sharded else "all")
        self.axis, self.comm, self.gather_comm = groups.axis, groups.reduce, groups.gather
        self.replicas, self.everyone, self.control = groups.replicas, groups.everyone, groups.control
        self._whole_grads = whole_grads
        self.factory = UnitFactory(
            precision,
            rank=self.comm.rank if sharded else 0,
            world=self.comm.world if sharded else 1,
            device=self.device,
            cut=settings.cut,
            split=Split(settings.bucket_numel, tuple(settings.leaves)),
            keep_whole=settings.keep_whole,
            master_apart=settings.gather is not None or (away is not None and away.apart("master")),
        )
        _refuse_owned(model)
        precision.refuse_unmatched(model)
        self.units = [self.factory.make(plan) for plan in self.factory.plan(model)]
        for unit in self.units:
            self._fill(unit)
        if away is not None:
            away.settle()
        self._fill_buffers()
        self.parked = Parked()
        self.changes = ChangeGate()  # opened right before masters change
        self.before_next_change = self.changes.before_next_change
        self._connect()
        self.replanner = Replanner(self)
        self.depth = 0  # forwards of the root under way, one inside the other
        model.register_forward_pre_hook(outside_of_graphs(self._enter))
        model.register_forward_hook(outside_of_graphs(self._leave), with_kwargs=True, always_call=True)
        self.mesh.log.clear()

    # -- construction --------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Everything that follows from `units`: who is trainable, the reducer, the hooks, who owns what."""
        self.trainable = [unit for unit in self.units if unit.trainable]
        for route in self.routes.values():
            route.connect(self)
        self.reducer = GradReducer(
            self.trainable,
            self._groups,
            sharded=self.sharded,
            whole_grads=self._whole_grads,
            codec=self.options.reduce,
            overlap=self.options.overlap,
            away=self.store.away,
        )
        self.hooks = OwnerHooks(self)
        self._place: dict[int, tuple[FlatUnit, int]] = {
            id(param): (unit, index)
            for unit in self.units
            for params in (
                unit.params,
                [param for _, param in unit.plan.params],
            )  # the latter: as meta tensors
            for index, param in enumerate(params)
        }
        for unit in self.units:
            for param in unit.params:
                _OWNERS[param] = weakref.ref(self)

    def reconnect(self, units: list[FlatUnit], leaving: Sequence[nn.Parameter]) -> None:
        """Other units from here on, without the parameters that left the model."""
        self.hooks.remove()
        for param in leaving:
            _OWNERS.pop(param, None)  # type: ignore[no-untyped-call]
        last, hold, share = self.reducer.last, self.reducer.hold, self.reducer.share
        self.units = units
        self._connect()
        self.reducer.last, self.reducer.hold, self.reducer.share = last, hold, share

    def make_real(self, units: Sequence[FlatUnit]) -> None:
        """Meta parameters of these units get bytes and values, where the owner knows how."""

    def _fill_buffers(self) -> None:
        for buffer in self.model.buffers():
            self.take_from_first(buffer, "a buffer")

    def _fill(self, unit: FlatUnit) -> None:
        flat = flatten(unit)
        self.take_from_first(flat, unit.about)
        unit.adopt(flat, self.store)

    def take_from_first(self, tensor: Tensor, about: str = "") -> None:
        """The contents of a tensor that every rank has become rank 0's. Collective over all data ranks."""
        self.everyone.broadcast(tensor, about=about).wait()

    @property
    def routes(self) -> dict[str, Route]:
        """What carries gradients ("reduce") and parameters ("gather") where that is more than a codec."""
        found = {"reduce": self.options.reduce, "gather": self.options.gather}
        return {name: route for name, route in found.items() if isinstance(route, GradientRoute | ParamRoute)}

    # -- the root's forward (these two hooks outlive any change of units) ----------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        try:
            self.parked.need("a forward", "param")
            if self.depth == 0 and not in_backward():
                self.replanner.before_forward()
        finally:
            self.depth += 1  # also when that raised: the hook after the forward runs in any case

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.depth = max(0, self.depth - 1)

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def shards(self) -> Sequence[FlatUnit]:
        """What an optimizer updates: every trainable unit's slice on this rank."""
        return self.trainable

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Brackets one forward and backward; `last` lets gradients that stay whole be reduced in it."""
        self.reducer.last = last
        try:
            yield
        finally:
            self.reducer.last = None

    def drain(self) -> None:
        """Collective: all shards' gradients are final after this. Calling it twice costs nothing."""
        self.parked.need("reducing gradients", "grad")
        self.replanner.before_drain()
        self.reducer.drain()

    def close_round(self) -> None:
        """The outermost backward has ended."""
        self.reducer.close_round()

    def gradients_taken(self, unit: FlatUnit) -> None:
        """All gradients of a unit are in its bucket (where parameters are cut they are let go here)."""

    def zero_grad(self, slots: Mapping[FlatUnit, Sequence[int]] | None = None) -> None:
        """Drop all gradients, or those of some slots, reduced or not."""
        if slots is None:
            self.reducer.clear()
        else:
            self.reducer.clear_slots(slots)

    @contextlib.contextmanager
    def whole(self, units: Sequence[FlatUnit]) -> Iterator[None]:
        """Parameters of `units` are whole inside. Collective where they are sharded."""
        self.parked.need("reading or writing parameters", "param")
        self.settle()
        yield

    # -- looking -------------------------------------------------------------------------------------------

    def place(self, param: Tensor) -> tuple[FlatUnit, int]:
        """The unit and slot number of a parameter. Raises LookupError for a stranger."""
        found = self._place.get(id(param))
        if found is None:
            raise LookupError("this tensor is no parameter of the sharded model")
        return found


class _Options:
    """Settings with one default each, shared by the owners."""

    def __init__(
        self,
        *,
        cut: Cut | frozenset[str] = "flat",
        bucket_numel: int = 1_000_000,
        reduce: Codec | GradientRoute | None = None,
        gather: Codec | ParamRoute | None = None,
        overlap: bool = True,
        keep_whole: Callable[[UnitPlan], bool] = lambda plan: True,
        across: Across = "shard",
        leaves: Sequence[str] = (),
    ) -> None:
        self.across, self.leaves = across, leaves
        self.cut, self.bucket_numel, self.reduce, self.gather = cut, bucket_numel, reduce, gather
        self.overlap, self.keep_whole = overlap, keep_whole


class ReplicatedOwner(FlatOwner):
    """Stage 0: plain data parallel over flat buckets. Every rank holds and updates everything."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        keep_fp32: Sequence[str] = (),
        **options: Any,
    ) -> None:
        precision = Precision(param=dtype_of(dtype), keep_fp32=tuple(keep_fp32))
        super().__init__(model, mesh, sharded=False, whole_grads=True, precision=precision, **options)


def _features(model: nn.Module, precision: Precision, options: _Options, mesh: Mesh) -> set[str]:
    """What is joined here, in the words of ds_core.limits."""
    params = list(model.named_parameters(remove_duplicate=False))
    dtypes = {precision.param or p.dtype for _, p in params if p.is_floating_point()}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    found = {names[dtype] for dtype in dtypes if dtype in names and len(dtypes) == 1}
    there = {
        "tied": len({id(p) for _, p in params}) < len(params),
        "frozen": not all(p.requires_grad for _, p in params),
        "replicas": mesh.size("dp_replicate") > 1,
        "meta": mesh.accelerator.device.type != "meta" and any(p.is_meta for _, p in params),
        "whole cut": options.cut != "flat",
        "reduce codec": options.reduce is not None,
        "gather codec": options.gather is not None,
        "keep_fp32": bool(precision.keep_fp32),
        "leaves": bool(options.leaves) or any(getattr(m, LEAF_MARK, False) for m in model.modules()),
    }
    return found | swapped_in(model) | {name for name, is_there in there.items() if is_there}


def _refuse_owned(model: nn.Module) -> None:
    owned = [name for name, param in model.named_parameters() if param in _OWNERS]
    if owned:
        raise ValueError(f"{owned[0]} (and {len(owned) - 1} more) is sharded already; shard a model once")
