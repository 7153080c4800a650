"""Any world size and stage reads any other's checkpoint to the bit; 20 steps equal 10 + new process + 10."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import CheckpointStore, Engine, ReplicatedOwner, ShardedOptimizer
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES, Batch
from ds_core.train.rng import RngState
from ds_zero import Zero

CASE = CASES["tied"]
WORLDS = (1, 2, 3, 4)
STAGES = (0, 1, 2, 3)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return CASE.losses(model, batch)[0]


def build(stage: int, dtype: str | None = None) -> Engine:
    model = CASE.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if stage == 0:
        owner: Any = ReplicatedOwner(model, dtype=dtype)
    else:
        owner = Zero.model_validate({"stage": stage, "dtype": dtype, "bucket_numel": 100}).shard(model)
    sharded = ShardedOptimizer(optimizer, owner)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
    return Engine(model, owner, sharded, max_norm=1.0, scheduler=schedule)


def train(engine: Engine, first: int, last: int, rank: int, world: int) -> list[float]:
    return [
        engine.train_batch([CASE.rank_batch(step, rank, world)], loss_fn).loss for step in range(first, last)
    ]


def whole_state(engine: Engine) -> dict[str, str]:
    """Every saved tensor whole, as a hash: gathered from all ranks through the parts' own shards."""
    found: dict[str, Tensor] = {}
    for part in ("model", "optimizer"):
        for name, value in engine.parts()[part].state_dict().items():
            if isinstance(value, Tensor):
                found[f"{part}/{name}"] = value.clone()
            elif hasattr(value, "local"):
                whole = torch.zeros(value.shape, dtype=torch.float64).view(-1)
                whole[value.start : value.start + value.local.numel()] = value.local.double()
                found[f"{part}/{name}"] = whole
    return {name: _digest(tensor) for name, tensor in sorted(_summed(found).items())}


def _summed(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the ranks' pieces: each element is held by one rank, or by all alike (then of rank 0)."""
    dist = torch.distributed
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    names: set[str] = set()
    for rank in range(dist.get_world_size()):
        text = "\n".join(f"{n} {','.join(map(str, t.shape))}" for n, t in mine.items()).encode()
        size = torch.tensor([len(text)])
        dist.broadcast(size, rank)
        block = torch.zeros(int(size), dtype=torch.uint8)
        if rank == dist.get_rank():
            block.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(block, rank)
        names |= set(bytes(block.tolist()).decode().split("\n"))
    total = {}
    for line in sorted(names):
        name, _, shape = line.rpartition(" ")
        dims = [int(d) for d in shape.split(",") if d]
        piece = mine.get(name, torch.zeros(dims, dtype=torch.float64)).double()
        highest, lowest = piece.clone(), piece.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        total[name] = torch.where(highest.abs() >= lowest.abs(), highest, lowest)
    return total


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.double().contiguous().view(-1).numpy().tobytes()).hexdigest()


def save(rank: int, world: int, stage: int, dtype: str | None, folder: Path) -> dict[str, str]:
    engine = build(stage, dtype)
    train(engine, 0, 3, rank, world)
    CheckpointStore(folder).save(3, engine.parts())
    return whole_state(engine)


def load(rank: int, world: int, dtype: str | None, folder: Path) -> list[dict[str, str]]:
    """What each stage holds after loading; each must be able to go on training, too."""
    states = []
    for stage in STAGES:
        engine = build(stage, dtype)
        CheckpointStore(folder).load(engine.parts())
        assert engine.global_steps == 3
        states.append(whole_state(engine))
        train(engine, 3, 4, rank, world)
    return states


@pytest.mark.parametrize(
    ("saved_world", "saved_stage", "dtype"),
    [(world, stage, None) for world in WORLDS for stage in STAGES]
    + [(2, stage, "bfloat16") for stage in STAGES],
)
def test_any_world_and_stage_reads_any_other(
    saved_world: int, saved_stage: int, dtype: str | None, tmp_path: Path
) -> None:
    expected = run_ranks(save, saved_world, stage=saved_stage, dtype=dtype, folder=tmp_path)[0]
    for world in WORLDS:
        for rank, states in enumerate(run_ranks(load, world, dtype=dtype, folder=tmp_path)):
            for stage, found in zip(STAGES, states, strict=True):
                assert found == expected, f"world {world}, stage {stage}, rank {rank}"


def straight(rank: int, world: int, stage: int) -> list[float]:
    return train(build(stage), 0, 20, rank, world)


def first_half(rank: int, world: int, stage: int, folder: Path) -> list[float]:
    engine = build(stage)
    losses = train(engine, 0, 10, rank, world)
    CheckpointStore(folder).save(10, {**engine.parts(), "rng": RngState()}, user={"note": "half way"})
    return losses


def second_half(rank: int, world: int, stage: int, folder: Path) -> list[float]:
    engine = build(stage)
    user = CheckpointStore(folder).load({**engine.parts(), "rng": RngState()})
    assert user == {"note": "half way"}
    return train(engine, engine.global_steps, 20, rank, world)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_twenty_steps_equal_ten_and_ten_to_the_bit(world: int, stage: int, tmp_path: Path) -> None:
    expected = run_ranks(straight, world, stage=stage)
    first = run_ranks(first_half, world, stage=stage, folder=tmp_path)
    second = run_ranks(second_half, world, stage=stage, folder=tmp_path)
    for rank in range(world):
        assert first[rank] + second[rank] == expected[rank]
