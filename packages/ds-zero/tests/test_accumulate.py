"""no_sync: one reduction for several backwards, the same weights, at every stage."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_core import ShardedOptimizer
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_zero import Zero, full_tensor, no_sync


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_one_reduction_for_four_backwards(stage: int) -> None:
    case, steps, micro = CASES["mlp"], 3, 4
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    owner = Zero(stage=stage, bucket_numel=1).shard(model)
    ShardedOptimizer(optimizer, owner)

    def backward(seed: int) -> None:
        batch = case.rank_batch(seed, dist.get_rank(), 2)
        (torch.stack(case.losses(model, batch)).sum() / micro).backward()

    for step in range(steps):
        owner.mesh.log.clear()
        with no_sync(model):
            for number in range(micro - 1):
                backward(10 * step + number)
            assert owner.mesh.log.calls["dp_shard", "reduce_scatter"] == 0
        backward(10 * step + micro - 1)
        optimizer.step()
        assert owner.mesh.log.calls["dp_shard", "reduce_scatter"] == len(owner.units)
        optimizer.zero_grad()
    twin = Twin(
        case, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), ranks=2, zero_unused=False
    )
    for step in range(steps):
        twin.step([case.make_batch(10 * step + number, 2) for number in range(micro)])
    assert_close_norm({name: full_tensor(p) for name, p in model.named_parameters()}, twin.parameters(), 1e-5)


@distributed(2)
def test_what_was_held_back_is_reduced_at_the_step() -> None:
    model = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ShardedOptimizer(optimizer, Zero(stage=2).shard(model))
    with no_sync(model):
        model(torch.full((1, 4), float(dist.get_rank()))).sum().backward()
    optimizer.step()
    assert torch.equal(full_tensor(model.weight), torch.full((4, 4), -0.5))


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(LookupError, match="shard the model first"), no_sync(torch.nn.Linear(2, 2)):
        pass
