"""ZeRO's owner: shards that become whole for their users, and nothing else of the model in between."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ds_core.ground.accelerator import return_freed_memory
from ds_core.ground.mesh import Mesh, Topology
from ds_core.protocols import Codec, Store
from ds_core.setup.estimate import Recipe, check_fits
from ds_core.state.layout import Cut
from ds_core.state.owner import FlatOwner
from ds_core.state.precision import Precision
from ds_core.state.replan import finish
from ds_core.state.route import GradientRoute, ParamRoute
from ds_core.state.unit import FlatUnit, Whole
from ds_core.state.units import UnitPlan, plan_units
from ds_zero.deferred import shared_source
from ds_zero.fill import (
    Initializer,
    forget_recipes,
    materialize_buffers,
    materialize_unit,
    read_unit,
    refuse_unfillable,
)
from ds_zero.gatherer import Gatherer
from ds_zero.hooks import UseHooks
from ds_zero.stages import Lifetime

_TRIM_BYTES = 16 << 20  # what filling may leave as holes in the host's memory


class Settings(Protocol):
    """What the owner reads of `Zero(...)`."""

    stage: Literal[1, 2, 3]
    cut: Cut | frozenset[str]
    bucket_numel: int
    prefetch_numel: int
    keep_numel: int
    persist_numel: int
    overlap: bool
    keep_fp32: tuple[str, ...]
    secondary_shard: bool
    leaves: tuple[str, ...]
    initializer: Initializer | None

    @property
    def lifetime(self) -> Lifetime: ...
    @property
    def param_dtype(self) -> torch.dtype | None: ...
    @property
    def accumulate_dtype(self) -> torch.dtype | None: ...


class ZeroOwner(FlatOwner):
    """Stages 1 to 3, in place on the user's module.

    Masters and optimizer state are always cut. At stages 1 and 2 parameters stay whole and are refreshed
    after each step; at stage 3 a unit is gathered for the forward and the backward of the modules that use
    it and let go afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh | None,
        config: Settings,
        *,
        store: Store | None = None,
        gather: Codec | ParamRoute | None = None,
        reduce: Codec | GradientRoute | None = None,
    ) -> None:
        self.config, self.stage = config, config.stage
        extra = {"persist": config.persist_numel, "second shard": config.secondary_shard}
        self.extra_features = frozenset(name for name, there in extra.items() if there)
        refuse_unfillable(model, config.initializer)
        mesh = mesh or Topology().build()
        _refuse_no_nodes(mesh, config)
        _refuse_too_large(model, mesh, config, store)
        self.lifetime: Lifetime = config.lifetime
        self._freed_bytes = 0  # of units that were filled since freed memory was last handed back

        def keep_whole(plan: UnitPlan) -> bool:
            return self.lifetime.whole_params or plan.numel < config.persist_numel

        super().__init__(
            model,
            mesh,
            sharded=True,
            whole_grads=self.lifetime.whole_grads,
            precision=Precision(config.param_dtype, config.accumulate_dtype, config.keep_fp32),
            store=store,
            cut=config.cut,
            bucket_numel=config.bucket_numel,
            reduce=reduce,
            overlap=config.overlap,
            keep_whole=keep_whole,
            gather=gather,
            leaves=config.leaves,
            across="all" if config.secondary_shard else "shard",
        )

    def _connect(self) -> None:
        super()._connect()
        config = self.config
        node = self.mesh.communicator("dp_shard", "gather") if config.secondary_shard else None
        self.gatherer = Gatherer(self.gather_comm, self.options.gather, node=node, away=self.store.away)
        prefetch = config.prefetch_numel if config.overlap else 0
        self.uses = UseHooks(self, prefetch_numel=prefetch, keep_numel=config.keep_numel)

    def _enter(self, module: nn.Module, args: Any) -> None:
        super()._enter(module, args)
        self.uses.enter_root(args)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            self.uses.leave_root(args, kwargs, output)
        finally:
            super()._leave(module, args, kwargs, output)

    def reconnect(self, units: list[FlatUnit], leaving: Sequence[nn.Parameter]) -> None:
        self.uses.retire()
        super().reconnect(units, leaving)

    def make_real(self, units: Sequence[FlatUnit]) -> None:
        refuse_unfillable(self.model, self.config.initializer)
        materialize_buffers(self.model, self.device, self.config.initializer)
        for unit in units:
            materialize_unit(self.model, unit, self.device, self.config.initializer, files=True)
            forget_recipes(unit)

    def _fill_buffers(self) -> None:
        materialize_buffers(self.model, self.device, self.config.initializer)
        super()._fill_buffers()

    def _fill(self, unit: FlatUnit) -> None:
        flat = materialize_unit(self.model, unit, self.device, self.config.initializer)
        if self.device.type != "meta" and any(shared_source(param) is not None for param in unit.params):
            read_unit(self.model, unit, self.store, self.take_from_first)
            if unit.keep_whole:
                self.gather_comm.all_gather(unit.whole, unit.local, about=unit.about).wait()
            finish(unit)
        elif flat is not None:
            self.take_from_first(flat, unit.about)
            unit.adopt(flat, self.store)
        else:
            super()._fill(unit)
        forget_recipes(unit)
        self._freed_bytes += unit.layout.numel * unit.master_dtype.itemsize
        if self._freed_bytes > _TRIM_BYTES:
            return_freed_memory(self.mesh.accelerator)
            self._freed_bytes = 0

    def close_round(self) -> None:
        super().close_round()
        self.uses.end_of_backward()

    def gradients_taken(self, unit: FlatUnit) -> None:
        self.uses.gradients_taken(unit)

    def publish(self, *, wait: bool = True, copied: frozenset[str] = frozenset()) -> None:
        self.uses.end_of_backward()  # a graph that no backward went through holds old weights
        super().publish(wait=wait, copied=copied)

    def copies(self) -> Sequence[Tensor]:
        return self.gatherer.second_shards()

    def let_whole_go(self) -> None:
        self.uses.end_of_backward()

    def publish_late(self, keys: frozenset[str]) -> None:
        self.uses.end_of_backward()
        super().publish_late(keys)

    def publish_unit(self, unit: FlatUnit) -> None:
        """Whole copies are old now: gather those that stay, forget the others."""
        if not unit.keep_whole and not unit.pinned:
            self.gatherer.release(unit)
            return
        if unit.state is Whole.COMING:
            unit.arrive(unit.ticket)
        unit.state = Whole.STALE
        self.gatherer.launch(unit)

    @contextlib.contextmanager
    def whole(self, units: Sequence[FlatUnit]) -> Iterator[None]:
        """Parameters of `units` are whole and current inside. Collective at stage 3."""
        self.parked.need("reading or writing parameters", "param")
        self.settle_late()
        stay = {id(unit) for unit in units if unit.state is Whole.READY}  # in the middle of a forward
        self.gatherer.acquire_all(units)
        for unit in units:
            unit.pinned += 1
        try:
            yield
        finally:
            for unit in units:
                unit.pinned -= 1
                if id(unit) not in stay and not unit.rewritten():  # else its values are nowhere else
                    self.gatherer.release(unit)


def _refuse_no_nodes(mesh: Mesh, config: Settings) -> None:
    """Raises ValueError where a second shard would be the same as the first."""
    nodes, ranks = mesh.size("dp_replicate"), mesh.size("dp_shard")
    if config.secondary_shard and (config.stage < 3 or nodes == 1 or ranks == 1):
        raise ValueError(
            f"secondary_shard keeps a second shard of the parameters inside each node: it needs stage 3, got "
            f"{config.stage}, and Topology(dp_replicate=<nodes>, dp_shard=<ranks of a node>) with several of "
            f"both, got {nodes} x {ranks}"
        )


def _refuse_too_large(model: nn.Module, mesh: Mesh, config: Settings, store: Store | None) -> None:
    """A meta model has no bytes yet: say before any are taken that they will not fit.

    Raises DoesNotFit (a ValueError) with the estimate of every stage and what to change.
    """
    accelerator = mesh.accelerator
    first = next(iter(model.parameters()), None)
    if first is None or not first.is_meta or accelerator.device.type == "meta":
        return
    away = None if store is None else store.away
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.is_cpu else 1
    dtype = config.param_dtype or first.dtype
    grad_dtype = config.accumulate_dtype or torch.float32
    check_fits(
        model,
        ranks=mesh.size("data" if config.secondary_shard else "dp_shard"),
        stage=config.stage,
        available=accelerator.free_bytes() / sharing,
        recipe=Recipe(str(dtype).removeprefix("torch."), str(grad_dtype).removeprefix("torch.")),
        largest_unit=max(
            plan.numel for plan in plan_units(model, bucket_numel=config.bucket_numel, leaves=config.leaves)
        ),
        shares=None if away is None else away.shares(accelerator.device),
    )
