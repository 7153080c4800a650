"""What an engine that was put together in code is really set to, and which of it has an effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from ds_core.ground.collectives import TorchCommunicator
from ds_core.ground.settings import Origin, Setting, Settings
from ds_core.state.owner import FlatOwner
from ds_core.train.optim import ShardedOptimizer

_DEFAULT, _CODE = Origin("default"), Origin("code")


@runtime_checkable
class Explained(Protocol):
    """A config that says what each of its values does."""

    def settings(self, world: int) -> list[Setting]: ...


@runtime_checkable
class Planned(Protocol):
    """What a config file came to, key by key."""

    keys: tuple[Setting, ...]


@runtime_checkable
class SaysHow(Protocol):
    """A route that says in one line what really travels."""

    def explain(self) -> str: ...


class Stepping(Protocol):
    """What is read of an engine."""

    owner: FlatOwner
    optimizer: ShardedOptimizer
    scaler: Any
    overflows_before_naming: int


def explain_engine(engine: Stepping) -> Settings:
    """Keys of the config file, if any; then what engine, owner and optimizer are set to now."""
    found = [*_engine(engine), *_owner(engine.owner), *_optimizer(engine.optimizer)]
    plan = getattr(engine, "plan", None)
    if not isinstance(plan, Planned):
        return Settings(found)
    built = Origin("derived", "the config, or given to initialize()")
    return Settings(
        [*plan.keys, *(replace(row, source=built) if row.source.kind == "code" else row for row in found)]
    )


def _engine(engine: Stepping) -> Iterator[Setting]:
    parameters = inspect.signature(type(engine).__init__).parameters
    acts = {
        "max_norm": ("Engine.step clips the global norm", "no clipping"),
        "accumulate": ("micro batches per optimizer step", "every micro batch is a step"),
        "scaler": ("Engine.backward scales the loss, Engine.step skips overflows", "losses are not scaled"),
        "scheduler": ("steps after every step that was not skipped", "the learning rate stays"),
        "sink": ("gets every StepReport", "reports go to the caller only"),
    }
    for name, (does, does_not) in acts.items():
        value: Any = getattr(engine, name)
        default = parameters[name].default if name in parameters else None
        active = value is not None and (name != "accumulate" or value > 1)
        source = _DEFAULT if value is default or value == default else _CODE
        shown = value if isinstance(value, int | float | None) else type(value).__name__
        yield Setting(f"engine.{name}", shown, source, does if active else does_not, active)
    if engine.scaler is not None:
        for name, value in sorted(vars(engine.scaler).items()):
            yield Setting(f"scaler.{name}", value, _CODE, "loss scale", True)
    name, after = "overflows_before_naming", engine.overflows_before_naming
    source = _CODE if name in vars(engine) else _DEFAULT
    active = engine.scaler is not None
    yield Setting(f"engine.{name}", after, source, "overflows in a row before they are named", active)


def _owner(owner: FlatOwner) -> Iterator[Setting]:
    world = owner.everyone.world
    axis = owner.axis if owner.replicas.world == 1 else "data"
    yield Setting("owner.ranks", world, Origin("derived", f"mesh axis {axis}"), "the data axis", world > 1)
    yield Setting("owner.device", str(owner.device), Origin("derived", "the mesh"), "parameters, gradients")
    for kind, route in owner.routes.items():
        says = route.explain() if isinstance(route, SaysHow) else "a route"
        yield Setting(f"wire.{kind}", type(route).__name__, _CODE, says, world > 1)
    if isinstance(owner.everyone, TorchCommunicator):
        carries = owner.everyone.route
        yield Setting("owner.route", carries, Origin("derived", "what all ranks have"), "CPU tensors' way")
    config = getattr(owner, "config", None)
    if isinstance(config, Explained):
        yield from config.settings(world)
        return
    dtype = owner.precision.param
    yield Setting("owner.stage", 0, _CODE, f"{type(owner).__name__}: everything is whole on every rank")
    yield Setting("owner.dtype", str(dtype), _CODE if dtype else _DEFAULT, "parameters", dtype is not None)
    given = owner.given
    for name, acts in (("bucket_numel", "units"), ("overlap", "reductions"), ("reduce", "gradients' wire")):
        value = getattr(owner.options, name)
        shown = value if isinstance(value, int | None) else type(value).__name__
        active = value is not None and (name == "bucket_numel" or world > 1)
        yield Setting(f"owner.{name}", shown, _CODE if name in given else _DEFAULT, acts, active)


def _optimizer(sharded: ShardedOptimizer) -> Iterator[Setting]:
    kind, defaults = type(sharded.optimizer).__name__, sharded.optimizer.defaults
    yield Setting("optimizer", kind, _CODE, f"over shards, cut {sharded.owner.cut}")
    for index, group in enumerate(sharded.param_groups):
        for name in sorted(group.keys() - {"params"}):
            value = group[name]
            same = name in defaults and value == defaults[name]
            source = Origin("derived", "the optimizer's defaults") if same else _CODE
            yield Setting(f"optimizer.groups.{index}.{name}", value, source, kind, value is not None)
