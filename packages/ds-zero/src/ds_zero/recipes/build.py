"""From settings to the objects that train: model, owner, optimizer, schedule, engine, order of data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core import (
    DynamicScale,
    Engine,
    FlatOwner,
    ReplicatedOwner,
    ResumableLoader,
    ResumableSampler,
    ShardedOptimizer,
    Topology,
    initialize,
)
from ds_core.protocols import Saveable
from ds_core.setup import plugins
from ds_core.train.lr import Schedule
from ds_core.train.rng import RngState
from ds_zero import Zero
from ds_zero.recipes.data import Windows
from ds_zero.recipes.flags import Settings
from ds_zero.recipes.from_config import config_for
from ds_zero.recipes.model import GPT, GPTConfig
from ds_zero.recipes.pace import Pace
from ds_zero.recipes.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Split:
    """How a global batch is cut: `batch` sequences x `accumulate` micro batches x `world` ranks."""

    batch: int
    accumulate: int
    world: int

    @property
    def global_batch(self) -> int:
        return self.batch * self.accumulate * self.world

    def over(self, world: int) -> Split:
        """The same global batch on another number of ranks. Raises ValueError with the equation."""
        return split_batch(self.global_batch, self.batch, world)


def split_batch(global_batch: int, batch: int, world: int) -> Split:
    """Find how often to accumulate. Raises ValueError with every number when there is no whole answer."""
    accumulate, rest = divmod(global_batch, batch * world)
    if rest or not accumulate:
        raise ValueError(
            f"global batch {global_batch} = batch {batch} x accumulate x {world} ranks has no whole answer "
            f"({global_batch / (batch * world):.2f}): give a --batch for which batch x {world} divides "
            f"{global_batch}, or another number of ranks"
        )
    return Split(batch, accumulate, world)


@dataclass(slots=True)
class Job:
    """Everything one phase trains with. `parts` is what its checkpoints hold."""

    engine: Any
    owner: Any
    optimizer: Any
    model: nn.Module
    loader: ResumableLoader
    parts: dict[str, Saveable]
    optimizer_name: str

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro batches (ids [B, T], targets [B, T]) for ever, epoch after epoch."""
        while True:
            for ids_BT, targets_BT in self.loader:
                yield ids_BT.to(device), targets_BT.to(device)


class PacedSchedule(Schedule):
    """The peak rates times `Pace.factor`."""

    def __init__(self, optimizer: Optimizer, pace: Pace) -> None:
        self._pace = pace
        super().__init__(optimizer)

    def rates(self, step: int) -> list[float]:
        """`step` is the last finished one; the rates are for the next."""
        return [float(lr) * self._pace.factor(step + 1) for lr in self.base_lrs]


def build_job(
    settings: Settings,
    config: GPTConfig,
    windows: Windows,
    pace: Pace,
    ranks: Ranks,
    split: Split,
    stage: int,
) -> Job:
    """Shard a fresh model over the ranks there are now. Collective."""
    torch.manual_seed(settings.seed)
    # At stages 1 to 3 a unit gets its bytes when it is cut: no rank ever holds the whole model.
    with torch.device("meta") if stage else ranks.accelerator.device:
        model = GPT(config)
    if settings.config is None:
        engine, name = build_engine(settings, model, pace, ranks, split, stage)
    else:
        engine, name = initialize_engine(settings, model, pace, ranks, split, stage)
    loader = build_loader(windows, split, ranks.rank, settings.seed)
    parts = {**engine.parts(), "data": loader, "rng": RngState(device=ranks.accelerator.device)}
    return Job(engine, engine.owner, engine.optimizer, model, loader, parts, name)


def build_engine(
    settings: Settings, model: GPT, pace: Pace, ranks: Ranks, split: Split, stage: int
) -> tuple[Engine, str]:
    """The objects one by one, and the optimizer's name."""
    mesh = Topology().build(ranks.accelerator)
    owner: FlatOwner
    if stage:
        owner = Zero.model_validate({"stage": stage, "dtype": settings.dtype}).shard(model, mesh)
    else:
        owner = ReplicatedOwner(model, mesh, dtype=settings.dtype)
    optimizer, name = choose_optimizer(settings, list(model.parameters()), ranks.accelerator.device)
    engine = Engine(
        model,
        owner,
        ShardedOptimizer(optimizer, owner),
        max_norm=settings.clip or None,
        accumulate=split.accumulate,
        scaler=DynamicScale() if settings.dtype == "float16" else None,
        scheduler=PacedSchedule(optimizer, pace),
    )
    return engine, name


def initialize_engine(
    settings: Settings, model: GPT, pace: Pace, ranks: Ranks, split: Split, stage: int
) -> tuple[Engine, str]:
    """The same from a DeepSpeed file; an optimizer and a schedule of ours only if it names no optimizer."""
    assert settings.config is not None
    values = config_for(
        settings.config, stage=stage, batch=split.batch, accumulate=split.accumulate, world=split.world
    )
    own: dict[str, Any] = {}
    if "optimizer" not in values:
        own["optimizer"] = lambda params: choose_optimizer(settings, params, ranks.accelerator.device)[0]
        if "scheduler" not in values:
            own["lr_scheduler"] = lambda optimizer: PacedSchedule(optimizer, pace)
    engine, optimizer, _, _ = initialize(model=model, config=values, **own)
    return engine, f"{type(optimizer).__name__} through {settings.config}"


def build_loader(windows: Windows, split: Split, rank: int, seed: int) -> ResumableLoader:
    """One global order of windows, of which this rank takes its part."""
    sampler = ResumableSampler(
        len(windows), split.batch, rank=rank, world=split.world, accumulate=split.accumulate, seed=seed
    )
    return ResumableLoader(windows, sampler)


def choose_optimizer(
    settings: Settings, params: Sequence[Tensor], device: torch.device
) -> tuple[Optimizer, str]:
    """The optimizer and what to call it; weight decay on matrices only."""
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9), "torch SGD with momentum"
    kernel = plugins.find("optimizer", "fused_adamw") if settings.optimizer == "adamw" else None
    if kernel is not None:
        return kernel(groups, lr=settings.lr, betas=(0.9, 0.95)), "AdamW of ds-kernels"
    fused = device.type in ("cpu", "cuda", "xpu")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused), "torch AdamW"
