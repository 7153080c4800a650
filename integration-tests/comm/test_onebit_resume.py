"""1-bit optimizers from checkpoints: the same bits at the same world in any phase, the paper's at another."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm import MomentumWire, OnebitAdam
from ds_core import CheckpointStore, Engine, ShardedOptimizer
from ds_core.state.layout import plan_layout
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES

sys.path.insert(0, str(Path(__file__).parent))

from onebit_oracle import AdamOracle
from test_onebit import BLOCK, HYPER, hold_equal, own

CASE = CASES["mlp"]


def build(stage: int, dtype: str | None = None) -> Engine:
    model = CASE.build()
    optimizer = OnebitAdam(model.parameters(), freeze_step=2, wire=MomentumWire(block=BLOCK), **HYPER)
    owner = own(model, optimizer, stage, dtype)
    return Engine(model, owner, ShardedOptimizer(optimizer, owner))


def loss_of(model: Any, batch: Any) -> Tensor:
    return CASE.losses(model, batch)[0]


def go(engine: Engine, first: int, last: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        engine.train_batch([CASE.rank_batch(step, rank, world)], loss_of)


def whole(engine: Engine) -> dict[str, Tensor]:
    return {f"{unit.key}": unit.values().clone() for unit in engine.owner.trainable}


def resumes(rank: int, world: int, stage: int, dtype: str | None, folder: Path) -> None:
    """Saved after 1 step (warm-up), 2 (the freeze), 3 and 4 (signs); every one of them ends in the same bits."""
    engine = build(stage, dtype)
    store = CheckpointStore(folder)
    for step in range(6):
        if step in (1, 2, 3, 4):
            store.save(step, engine.parts())
        go(engine, step, step + 1)
    wanted, state = whole(engine), engine.optimizer.optimizer.state_dict()["state"]
    for step in (1, 2, 3, 4):
        again = build(stage, dtype)
        store.load(again.parts(), step)
        go(again, step, 6)
        for key, value in whole(again).items():
            assert torch.equal(value, wanted[key]), (step, key)
        for number, states in again.optimizer.optimizer.state_dict()["state"].items():
            for name, value in states.items():
                assert torch.equal(value, state[number][name]), (step, number, name)


@pytest.mark.parametrize(("world", "stage", "dtype"), [(2, 0, None), (2, 1, "bfloat16"), (3, 2, None)])
def test_any_phase_resumes_to_the_bit(world: int, stage: int, dtype: str | None, tmp_path: Path) -> None:
    run_ranks(resumes, world, stage=stage, dtype=dtype, folder=tmp_path)


def save(stage: int, folder: Path) -> None:
    engine = build(stage)
    go(engine, 0, 4)
    CheckpointStore(folder).save(4, engine.parts())


def goes_on_elsewhere(rank: int, world: int, stage: int, old_world: int, folder: Path) -> None:
    engine = build(stage)
    CheckpointStore(folder).load(engine.parts())
    units = engine.owner.trainable
    before = [
        SimpleNamespace(
            layout=plan_layout([(s.fqn, s.shape) for s in u.layout.slots], old_world if stage else 1),
            dtype=u.dtype,
        )
        for u in units
    ]
    old: Any = AdamOracle(CASE, before, world=old_world, stage=stage, block=BLOCK, freeze_step=2)
    for step in range(4):
        old.step([step])
    oracle = AdamOracle(CASE, units, world=world, stage=stage, block=BLOCK, freeze_step=2)
    oracle.take_over(old)
    hold_equal(engine.owner, oracle, engine.optimizer)
    for step in range(4, 7):
        go(engine, step, step + 1)
        oracle.step([step])
        hold_equal(engine.owner, oracle, engine.optimizer)


@pytest.mark.parametrize(("stage", "old_world", "world"), [(0, 2, 3), (2, 3, 2), (1, 2, 1)])
def test_another_world_goes_on_from_mean_errors(
    stage: int, old_world: int, world: int, tmp_path: Path
) -> None:
    run_ranks(save, old_world, stage=stage, folder=tmp_path)
    run_ranks(goes_on_elsewhere, world, stage=stage, old_world=old_world, folder=tmp_path)
