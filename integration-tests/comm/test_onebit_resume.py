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

from ds_comm import MomentumWire, OnebitAdam, OnebitLamb, ZeroOneAdam, ZeroOneSchedule
from ds_core import CheckpointStore, Engine, ShardedOptimizer
from ds_core.state.layout import plan_layout
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES

sys.path.insert(0, str(Path(__file__).parent))

from onebit_oracle import AdamOracle
from test_onebit import BLOCK, HYPER, hold_equal, own

CASE = CASES["mlp"]


def build(stage: int, dtype: str | None = None, kind: str = "adam") -> Engine:
    model = CASE.build()
    settings: dict[str, Any] = {"wire": MomentumWire(block=BLOCK), **HYPER}
    optimizer: Any
    if kind == "adam":
        optimizer = OnebitAdam(model.parameters(), freeze_step=2, **settings)
    elif kind == "lamb":
        optimizer = OnebitLamb(model.parameters(), freeze_step=2, **settings)
    else:
        clipper = 1 if stage else 2
        schedule = ZeroOneSchedule(2, local_step_scaler=1, local_step_clipper=clipper)
        optimizer = ZeroOneAdam(model.parameters(), schedule=schedule, **settings)
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


def resumes(rank: int, world: int, stage: int, dtype: str | None, kind: str, folder: Path) -> None:
    """Saved after 1 step (warm-up), 2 (the freeze), 3 and 4 (signs): each ends in the same bits."""
    engine = build(stage, dtype, kind)
    store, saved = CheckpointStore(folder), []
    for step in range(6):
        if step and getattr(engine.optimizer.optimizer, "synced", True):
            store.save(step, engine.parts())
            saved.append(step)
        elif step:
            with pytest.raises(
                RuntimeError, match=r"hold different parameters: save when `optimizer\.synced`"
            ):
                engine.optimizer.state_dict()
        go(engine, step, step + 1)
    wanted, state = whole(engine), engine.optimizer.optimizer.state_dict()["state"]
    assert len(saved) >= 3
    for step in saved:
        again = build(stage, dtype, kind)
        store.load(again.parts(), step)
        go(again, step, 6)
        for key, value in whole(again).items():
            assert torch.equal(value, wanted[key]), (step, key)
        for number, states in again.optimizer.optimizer.state_dict()["state"].items():
            for name, value in states.items():
                assert torch.equal(value, state[number][name]), (step, number, name)


@pytest.mark.parametrize(
    ("kind", "world", "stage", "dtype"),
    [
        ("adam", 2, 0, None),
        ("adam", 2, 1, "bfloat16"),
        ("adam", 3, 2, None),
        ("lamb", 2, 0, None),
        ("lamb", 2, 2, "bfloat16"),
        ("zero one", 2, 0, None),
        ("zero one", 2, 1, None),
    ],
)
def test_any_phase_resumes_to_the_bit(
    kind: str, world: int, stage: int, dtype: str | None, tmp_path: Path
) -> None:
    run_ranks(resumes, world, stage=stage, dtype=dtype, kind=kind, folder=tmp_path)


def from_adamw(world: int, folder: Path) -> None:
    """AdamW's checkpoint begins a warm-up of its own; 0/1 Adam counts AdamW's steps as refreshes."""
    model = CASE.build()
    plain = torch.optim.AdamW(model.parameters(), **HYPER)
    owner = own(model, SimpleNamespace(route=None, elementwise=True), 1, None)
    engine = Engine(model, owner, ShardedOptimizer(plain, owner))
    go(engine, 0, 3)
    CheckpointStore(folder).save(3, engine.parts())
    go(engine, 3, 4)
    for kind in ("adam", "zero one"):
        again = build(1, None, kind)
        CheckpointStore(folder).load(again.parts())
        optimizer: Any = again.optimizer.optimizer
        if kind == "adam":
            assert not optimizer.frozen
            go(again, 3, 4)
            assert all(torch.equal(value, whole(again)[key]) for key, value in whole(engine).items())
            go(again, 4, 6)
            assert optimizer.frozen
        else:
            assert (optimizer.steps, optimizer.refreshes) == (3, 3)
            go(again, 3, 5)


def test_adamws_checkpoint_goes_on(tmp_path: Path) -> None:
    run_ranks(from_adamw, 2, folder=tmp_path)


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
