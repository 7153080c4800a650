"""Overlap modes on real ranks: speculation changes no bit, the delayed update is its recurrence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.testing.distributed import distributed
from ds_core.train.engine import Engine
from ds_core.train.optim import ShardedOptimizer
from ds_core.train.scale import DynamicScale
from ds_offload import TieredStore
from ds_zero import (
    Zero,
    clip_grad_norm_,
    full_grad,
    full_optimizer_state,
    full_tensor,
    set_full_grad,
    set_full_tensor,
)
from ds_zero.ema import EMA

WIDTH = 96
TIERS = ("host", "nvme")


class Run:
    """A small model in several units at a stage, with or without a store."""

    def __init__(self, stage: int, dtype: str | None, lr: float = 1e-2, **settings: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1)
        self.store = TieredStore(**settings) if settings else None
        config = Zero.model_validate({"stage": stage, "dtype": dtype, "bucket_numel": 1, "keep_numel": 1})
        self.owner = config.shard(self.model, store=self.store)
        self.sharded = ShardedOptimizer(self.optimizer, self.owner)
        self.params = list(self.model.parameters())

    def loss(self, seed: int, scale: float = 1.0) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        x = torch.randn(8, WIDTH, generator=draw).to(self.owner.units[0].dtype)
        return self.model(x).float().square().mean() * scale

    def finish(self) -> None:
        """The last gradient has left, and a speculating worker has come to its end."""
        self.owner.drain()
        update: Any = self.sharded.elsewhere
        if update is not None and update.speculation is not None and update.speculation._pool is not None:
            update.speculation._pool.submit(int).result()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def counts(self) -> tuple[int, int, int]:
        update: Any = self.sharded.elsewhere
        found = update.speculation.counts
        return found.speculated, found.kept, found.rolled_back

    def values(self) -> list[Tensor]:
        found = [full_tensor(p) for p in self.params]
        found += [full_tensor(p, master=True) for p in self.params]
        states = [
            full_optimizer_state(self.optimizer, p, n) for p in self.params for n in ("exp_avg", "step")
        ]
        return found + [state for state in states if state is not None]


def assert_same(one: list[Tensor], two: list[Tensor], about: str) -> None:
    assert len(one) == len(two)
    different = [at for at, (a, b) in enumerate(zip(one, two, strict=True)) if not torch.equal(a, b)]
    assert not different, f"{about}: {len(different)} of {len(one)} differ, {different[:5]}"


def tiered(folder: str, tier: str, update: str, **settings: Any) -> dict[str, Any]:
    tiers = {"masters": tier, "moments": tier, "grads": tier, "params": tier}
    return {"nvme": folder, **tiers, "chunk_numel": 4096, "update": update, **settings}


def speculates(folder: str, stage: int, dtype: str | None, tier: str) -> None:
    """Clipped, not clipped, dropped, accumulated, looked at, and a learning rate that changes in between."""
    about = f"stage {stage}, {dtype}, {tier}"
    one, two = Run(stage, dtype), Run(stage, dtype, **tiered(folder, tier, "speculative"))
    for seed in range(8):
        for run in (one, two):
            for micro in range(2 if seed in (3, 4, 5) else 1):
                run.loss(10 * seed + micro).backward()
            run.finish()
            if seed == 7:
                run.optimizer.zero_grad()
                run.loss(99).backward()
                run.finish()
            if seed == 2:
                run.owner.state_dict()
                full_tensor(run.params[3], master=True)
            if seed == 4:
                run.optimizer.param_groups[0]["lr"] *= 0.5
            clip_grad_norm_(run.optimizer, 1e-4 if seed == 1 else 1e3)
            run.step()
        done, kept, thrown = two.counts
        if seed in (0, 1, 4):
            assert kept == 0, about
        if seed in (5, 6, 7):
            assert (done > 0) == (seed != 6), (about, seed)  # one micro batch after two: not foreseen
            assert thrown == 0, (about, seed)
        if seed == 1:
            assert thrown == done, about
            assert done > 0, about
    assert_same(one.values(), two.values(), about)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=1, timeout=200)
def test_speculation_on_one_rank(stage: int, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16"):
        for tier in TIERS:
            speculates(str(tmp_path), stage, dtype, tier)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2, timeout=200)
def test_speculation_on_two_ranks(stage: int, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16"):
        for tier in TIERS:
            speculates(str(tmp_path), stage, dtype, tier)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2, timeout=200)
def test_an_overflow_on_one_rank(stage: int, tmp_path: Path) -> None:
    """fp16, clipping on: what the other rank had speculated is rolled back, the rest is kept."""
    ends = []
    for settings in ({}, tiered(str(tmp_path), "host", "speculative")):
        run = Run(stage, "float16", **settings)
        scaler = DynamicScale(2.0**12, window=50, hysteresis=1)
        engine = Engine(run.model, run.owner, run.sharded, max_norm=10.0, accumulate=2, scaler=scaler)
        skipped, kept = 0, 0
        for seed in range(12):
            blown = seed == 7 and dist.get_rank() == 1
            engine.backward(run.loss(seed, 1e9 if blown else 1.0))
            if settings and (update := run.sharded.elsewhere) is not None and update.speculation._pool:  # type: ignore[attr-defined]
                update.speculation._pool.submit(int).result()  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = engine.step()
            if report is None:
                continue
            skipped += report.skipped
            if settings:
                done, taken, thrown = run.counts
                kept += taken
                assert thrown == (done if report.skipped else 0)
                assert done > 0 or report.step <= 2
        assert skipped == 1
        assert kept > 0 or not settings
        ends.append(run.values())
    assert_same(*ends, about=f"stage {stage}")


def delays(folder: str, stage: int, dtype: str | None, tier: str) -> None:
    """Against two models without offload: `shown` computes gradients, `true` gets every update."""
    about = f"stage {stage}, {dtype}, {tier}"
    run = Run(stage, dtype, **tiered(folder, tier, "delayed", delay_after=2))
    average = EMA(run.model, 0.5)
    shown, true = Run(stage, dtype), Run(stage, dtype)
    plain = Run(stage, dtype)
    averages = [full_tensor(p, master=True) for p in shown.params]
    for seed in range(7):
        for each in (run, plain):
            each.loss(seed).backward()
            clip_grad_norm_(each.optimizer, 0.02)
            each.step()
        shown.loss(seed).backward()
        true.loss(seed).backward()
        true.owner.drain()
        for at, (a, b) in enumerate(zip(shown.params, true.params, strict=True)):
            gradient = full_grad(a)
            assert gradient is not None
            set_full_grad(b, gradient)
            set_full_tensor(a, full_tensor(b, master=True))  # before this step's update: published late
            averages[at].lerp_(full_tensor(b, master=True), 0.5) if seed >= 2 else None
        shown.optimizer.zero_grad()
        clip_grad_norm_(true.optimizer, 0.02)
        true.step()
        if seed < 2 or seed == 4:
            for at, (a, b) in enumerate(zip(shown.params, true.params, strict=True)):
                set_full_tensor(a, full_tensor(b, master=True))
                averages[at].lerp_(full_tensor(b, master=True), 0.5) if seed < 2 else None
        if seed == 4:
            run.owner.state_dict()
    with average.applied():
        assert_same([full_tensor(p, master=True) for p in run.params], averages, f"{about}, averages")
    assert_same(run.values(), true.values(), about)
    assert not torch.equal(full_tensor(run.params[0]), full_tensor(plain.params[0])), about


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=1, timeout=200)
def test_delay_on_one_rank(stage: int, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16"):
        for tier in TIERS:
            delays(str(tmp_path), stage, dtype, tier)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2, timeout=200)
def test_delay_on_two_ranks(stage: int, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16"):
        for tier in TIERS:
            delays(str(tmp_path), stage, dtype, tier)


@pytest.mark.parametrize("update", ["step", "speculative"])
@pytest.mark.parametrize("tier", ["nvme", "0.5 host / 0.5 nvme"])
@distributed(world_size=3, timeout=100)
def test_gradients_written_between_micro_batches_are_added_to(tier: str, update: str, tmp_path: Path) -> None:
    """In the arithmetic in which those that stay are added up."""
    one, two = Run(2, None), Run(2, None, **tiered(str(tmp_path), tier, update))
    for seed in range(4):
        for run in (one, two):
            for micro in range(3):
                run.loss(10 * seed + micro).backward()
                if micro == 1:
                    run.owner.drain()
                    gradient = run.owner.trainable[1].gradient
                    assert gradient is not None
                    gradient.mul_(0.5)
            run.step()
    assert_same(one.values(), two.values(), tier)
