"""Any scheduler by its DeepSpeed or torch name, and torch's own as parts of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.train.lr import (
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    no_tensors,
)


class SaveableSchedule:
    """Any torch scheduler as a part of a checkpoint: its state as JSON, everything else passed on."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not set yet: do not look for it in itself
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float | Tensor]:
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Json]:
        """The scheduler's state. Raises ValueError naming what JSON cannot hold."""
        state = self.scheduler.state_dict()
        return {
            name: _to_json(value, f"{type(self.scheduler).__name__}.{name}") for name, value in state.items()
        }

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """A scheduler has no tensors: anything saved is an error."""
        return no_tensors(type(self.scheduler).__name__, saved)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Restore the state and write the rates of that step into the optimizer."""
        self.scheduler.load_state_dict({name: _from_json(value) for name, value in values.items()})
        for group, lr in zip(self.scheduler.optimizer.param_groups, self.get_last_lr(), strict=False):
            group["lr"] = lr


SCHEDULES: Mapping[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def torch_schedules() -> dict[str, type[LRScheduler]]:
    """The torch schedulers that can be built from a name and step without arguments."""
    found = {name: value for name, value in vars(lr_scheduler).items() if isinstance(value, type)}
    return {
        name: value
        for name, value in found.items()
        if issubclass(value, LRScheduler) and not name.startswith("_") and name not in _NOT_BY_NAME
    }


_NOT_BY_NAME = {"LRScheduler", "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler"}


def build_schedule(
    name: str, optimizer: Optimizer, params: Mapping[str, Any] | None = None
) -> Schedule | SaveableSchedule:
    """A schedule by its DeepSpeed or torch name.

    Raises: LookupError naming the known schedules; ValueError when the parameters do not fit.
    """
    known: dict[str, Callable[..., Any]] = {**torch_schedules(), **SCHEDULES}
    if name == "ReduceLROnPlateau":
        raise LookupError(
            'scheduler "ReduceLROnPlateau" steps on a metric: build it and call its step(metric) yourself'
        )
    if name not in known:
        raise LookupError(f'no scheduler "{name}"; known: {", ".join(sorted(known))}')
    try:
        built = known[name](optimizer, **(params or {}))
    except TypeError as error:
        raise ValueError(f'scheduler "{name}" does not take {dict(params or {})}: {error}') from error
    return built if isinstance(built, Schedule) else SaveableSchedule(built)


def saveable(scheduler: Any) -> Any:
    """The scheduler itself if a checkpoint can hold it, else wrapped so that it can."""
    return scheduler if hasattr(scheduler, "load_targets") else SaveableSchedule(scheduler)


def _to_json(value: Any, where: str) -> Json:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Counter):  # MultiStepLR's milestones: integer keys would come back as strings
        return {"$counter": sorted([int(key), count] for key, count in value.items())}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_to_json(item, f"{where}[{at}]") for at, item in enumerate(value)]
    raise ValueError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; give that scheduler plain numbers"
    )


def _from_json(value: Json) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$counter"}:
            return Counter(dict(value["$counter"]))
        return {key: _from_json(item) for key, item in value.items()}
    return [_from_json(item) for item in value] if isinstance(value, list) else value
