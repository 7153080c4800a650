"""Bytes of parameters, gradients and optimizer state per rank and stage, before anything runs (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ds_core.state.store import Shares
from ds_core.train.memory import Memory, advice, gigabytes

Stage = Literal[0, 1, 2, 3]
_BUFFERS = 500_000_000  # about what ds-offload's take by default

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# fp32 numbers that an optimizer keeps per parameter, besides the master
OPTIMIZER_STATES: Mapping[str, int] = {
    "adam": 2,
    "adamw": 2,
    "lion": 1,
    "adagrad": 1,
    "momentum": 1,
    "sgd": 0,
}


@dataclass(frozen=True, slots=True)
class Count:
    """Elements of a model: those that train, and those that are frozen."""

    trainable: int
    frozen: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Count:
        """Of a module, on any device ("meta" too); tied parameters count once."""
        params = list(model.parameters())
        trainable = sum(p.numel() for p in params if p.requires_grad)
        return cls(trainable, sum(p.numel() for p in params) - trainable)

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the bytes per element. `grad_dtype` None: that of the parameters.

    `states` are fp32 numbers per trainable parameter: 2 for Adam. Below 32 bits there is an fp32 master.
    """

    dtype: str = "bfloat16"
    grad_dtype: str | None = None
    states: float = 2

    def __post_init__(self) -> None:
        for name in (self.dtype, self.grad_dtype):
            if name is not None and name not in DTYPE_BYTES:
                raise ValueError(f"dtype {name!r}; allowed: {', '.join(DTYPE_BYTES)}")
        if self.states < 0:
            raise ValueError(f"states is {self.states}; it must be 0 or more fp32 numbers per parameter")

    @property
    def param_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def grad_bytes(self) -> int:
        return DTYPE_BYTES[self.grad_dtype or self.dtype]

    @property
    def optimizer_bytes(self) -> float:
        """The ZeRO paper's K: master and states. 12 for Adam in mixed precision, 8 in fp32."""
        master = 4 if self.param_bytes < 4 else 0
        return master + 4 * self.states


@dataclass(frozen=True, slots=True)
class Estimate:
    """Model states on one rank, in bytes, without activations. `working` is what a stage needs on top for
    the unit it computes with; 0 when the largest unit is not known.
    """

    stage: Stage
    ranks: int
    params: float
    grads: float
    optimizer: float
    working: float = 0.0

    @property
    def states(self) -> float:
        """The ZeRO paper's figure: parameters, gradients and optimizer state."""
        return self.params + self.grads + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.working


class DoesNotFit(ValueError):
    """More tensor than memory; the message has the table of all stages."""


def estimate(
    model: nn.Module | Count | int | float,
    *,
    ranks: int,
    stage: Stage,
    recipe: Recipe | None = None,
    largest_unit: int = 0,
    shares: Shares | None = None,
) -> Estimate:
    """Bytes per rank after Rajbhandari et al., "ZeRO", 2020, section 3: each stage divides one more part.

    `largest_unit`: elements of the largest block that is gathered at once. At stage 3 two of them are whole
    at a time (one computes, one arrives), and its gradients pass through one bucket.
    `shares`: what lives in other memory; then `working` has the buffers through which it travels.
    """
    count, recipe = _count(model), recipe or Recipe()
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; allowed: 0, 1, 2, 3")
    cut = [ranks if stage >= needed else 1 for needed in (3, 2, 1)]
    away = shares or Shares()
    left = away.params if stage == 3 else 0.0  # below stage 3 parameters stay whole
    working = away.buffers
    if stage == 3 and (ranks > 1 or left):
        working += largest_unit * (2 * recipe.param_bytes + recipe.grad_bytes)
    elif stage >= 2 and (ranks > 1 or away.grads):
        working += largest_unit * recipe.grad_bytes
    masters = recipe.optimizer_bytes - 4 * recipe.states
    optimizer = masters * (1 - away.masters) + 4 * recipe.states * (1 - away.moments)
    if not masters:  # an fp32 shard is its own master
        left = away.masters if stage == 3 else 0.0
    return Estimate(
        stage=stage,
        ranks=ranks,
        params=count.total * recipe.param_bytes * (1 - left) / cut[0],
        grads=count.trainable * recipe.grad_bytes * (1 - away.grads) / cut[1],
        optimizer=count.trainable * optimizer / cut[2],
        working=working,
    )


def estimate_all(
    model: nn.Module | Count | int | float,
    *,
    ranks: int,
    recipe: Recipe | None = None,
    largest_unit: int = 0,
    shares: Shares | None = None,
) -> list[Estimate]:
    """The same model at every stage."""
    count = _count(model)
    return [
        estimate(count, ranks=ranks, stage=stage, recipe=recipe, largest_unit=largest_unit, shares=shares)
        for stage in STAGES
    ]


def check_fits(
    model: nn.Module | Count | int | float,
    *,
    ranks: int,
    stage: Stage,
    available: float,
    recipe: Recipe | None = None,
    largest_unit: int = 0,
    shares: Shares | None = None,
) -> Estimate:
    """The estimate, if its model states fit into `available` bytes per rank.

    Raises DoesNotFit with all stages and what to change. What passes may still not fit: activations come
    on top.
    """
    recipe = recipe or Recipe()
    count = _count(model)
    stages = estimate_all(count, ranks=ranks, recipe=recipe, largest_unit=largest_unit, shares=shares)
    mine = stages[stage]
    if mine.total <= available:
        return mine
    raise DoesNotFit(
        f"{count.total:,} parameters in {recipe.dtype} at stage {stage} on {ranks} ranks need"
        f" {gigabytes(mine.total)} per rank without activations, there are {gigabytes(available)}\n"
        + text_table(stages, available)
        + "\n"
        + _cheapest(mine, recipe, int(mine.total - available))
        + _to_disk(count, ranks, recipe, largest_unit, available, shares)
        + _advice(count, stages, stage, available, recipe, largest_unit)
    )


def text_table(stages: Sequence[Estimate], available: float | None = None) -> str:
    """The stages as plain text, one line each."""
    lines = ["stage  parameters   gradients   optimizer     working       total"]
    for each in stages:
        parts = (each.params, each.grads, each.optimizer, each.working, each.total)
        mark = "" if available is None or each.total <= available else "   does not fit"
        lines.append(f"{each.stage:5}" + "".join(f"{gigabytes(part):>12}" for part in parts) + mark)
    return "\n".join(lines)


def _cheapest(mine: Estimate, recipe: Recipe, missing: int) -> str:
    """The three cheapest single changes, one line each."""
    parts = (mine.params, mine.grads, mine.optimizer, 0, mine.working, 0)
    changes = advice(
        Memory(*map(int, parts)),
        ranks=mine.ranks,
        stage=mine.stage,
        low=recipe.param_bytes < 4,
        recompute=True,
        single=True,
        missing=missing,
    )
    return "".join(f"  {number}. {change}\n" for number, change in enumerate(changes, 1))


def _advice(
    count: Count, stages: Sequence[Estimate], stage: int, available: float, recipe: Recipe, largest_unit: int
) -> str:
    fitting = next((each.stage for each in stages[stage + 1 :] if each.total <= available), None)
    if fitting is not None:
        return f"change: stage {fitting} fits"
    floor = estimate(count, ranks=2, stage=3, recipe=recipe, largest_unit=largest_unit).working
    if available > floor:
        need = -(-stages[3].states * stages[3].ranks // (available - floor))
        return f"change: stage 3 fits from {need:.0f} ranks of this size on"
    return f"change: smaller units; one of {largest_unit:,} elements alone needs {gigabytes(floor)}"


def _to_disk(
    count: Count, ranks: int, recipe: Recipe, largest_unit: int, available: float, shares: Shares | None
) -> str:
    """What is left in memory when all state is on a disk, where that would fit."""
    everything = Shares(1, 1, 1, 1, shares.buffers if shares is not None else _BUFFERS)
    least = estimate(count, ranks=ranks, stage=3, recipe=recipe, largest_unit=largest_unit, shares=everything)
    if shares == everything or least.total > available:
        return ""
    state = estimate(count, ranks=ranks, stage=3, recipe=recipe).states
    return (
        "  or on a disk, with ds-offload: stage 3, store=TieredStore(nvme=<folder>, "
        f'params="nvme", grads="nvme", masters="nvme", moments="nvme"): {gigabytes(least.total)} stay in '
        f"memory, {gigabytes(state)} per rank are on disk\n"
    )


def _count(model: nn.Module | Count | int | float) -> Count:
    if isinstance(model, Count):
        return model
    if isinstance(model, nn.Module):
        return Count.of(model)
    if model < 1 or model != int(model):
        raise ValueError(f"a model of {model!r} parameters; it must be a whole number, at least 1")
    return Count(int(model))
