"""Ranks with different numbers of batches: right averages, the same number of rounds, nothing hangs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_core import Engine, ReplicatedOwner, ShardedOptimizer
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import assert_close_norm
from ds_zero import Zero, full_tensor, join

CASE = CASES["mlp"]
HAVE = (2, 5, 3)  # batches of each rank


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sharded(stage: int) -> tuple[nn.Module, ShardedOptimizer, FlatOwner]:
    model = CASE.build()
    optimizer = sgd(model)
    owner = ReplicatedOwner(model) if stage == 0 else Zero(stage=stage, bucket_numel=1).shard(model)
    return model, ShardedOptimizer(optimizer, owner), owner


def reference(micro: int, world: int) -> dict[str, torch.Tensor]:
    """One process: each round adds the mean over the ranks that still have a batch."""
    model = CASE.build()
    optimizer = sgd(model)
    for number in range(max(HAVE[:world])):
        having = [rank for rank in range(world) if number < HAVE[rank]]
        for rank in having:
            loss = CASE.losses(model, CASE.rank_batch(number, rank, world))[0]
            (loss / len(having) / micro).backward()
        if (number + 1) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=3)
def test_the_mean_is_over_those_that_have_a_batch(stage: int, rank: int, world: int) -> None:
    for micro in (1, 2):
        model, optimizer, _ = sharded(stage)
        mine = join(model, (CASE.rank_batch(number, rank, world) for number in range(HAVE[rank])))
        rounds, counted = 0, 0
        for batch in mine:
            (CASE.losses(model, batch)[0] / micro).backward()
            rounds, counted = rounds + 1, counted + mine.active
            if rounds % micro == 0:
                optimizer.step()
                optimizer.zero_grad()
        assert (rounds, counted) == (5, HAVE[rank])
        optimizer.zero_grad()
        found = {name: full_tensor(param) for name, param in model.named_parameters()}
        assert_close_norm(found, reference(micro, world), 1e-6)


@distributed(world_size=2)
def test_not_a_number_in_a_filler_counts_nothing(rank: int) -> None:
    model, optimizer, _ = sharded(3)
    rows = [torch.ones(2, 6)] * (1 + rank)
    mine = join(nn.ModuleList([model]), rows, filler=rows[0])
    for batch in mine:
        loss = model(batch).square().mean()
        (loss if mine.active else loss * float("nan")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(torch.isfinite(full_tensor(param)).all()) for param in model.parameters())


@distributed(world_size=2)
def test_an_engine_weighs_by_tokens_instead(rank: int, world: int) -> None:
    model, optimizer, owner = sharded(2)
    engine = Engine(model, owner, optimizer)
    batches = [CASE.rank_batch(number, rank, world) for number in range(HAVE[rank])]
    mine = join(model, batches, weigh=False)
    for batch in mine:
        engine.backward(CASE.losses(model, batch)[0], tokens=4 if mine.active else 0)
        report = engine.step()
        assert report is not None
    assert report.tokens == 4  # rank 1 alone had a fifth batch
    found = {name: full_tensor(param) for name, param in model.named_parameters()}
    assert_close_norm(found, reference(1, world), 1e-6)
    batch = next(weighing := iter(join(model, batches[: 1 + rank])))
    engine.backward(CASE.losses(model, batch)[0], tokens=4)  # all ranks have one, nothing to weigh
    batch = next(weighing)
    with pytest.raises(ValueError, match="weigh=False"):
        engine.backward(CASE.losses(model, batch)[0], tokens=4)


@distributed(world_size=2)
def test_a_rank_without_any_batch_is_refused_on_all(rank: int) -> None:
    model, _, _ = sharded(1)
    with pytest.raises(ValueError, match="1 of 2 ranks have no batch at all"):
        next(iter(join(model, [torch.ones(2, 6)] * rank)))
    dist.barrier()


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(LookupError, match="shard the model first"):
        join(nn.Linear(2, 2), [])
