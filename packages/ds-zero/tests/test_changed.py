"""Looking for changes where there is nothing to move: it costs no communication, and nothing moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_core import ShardedOptimizer
from ds_core.testing.distributed import distributed
from ds_zero import Zero, full_tensor, replan


class Turns(nn.Module):
    """Two networks that freeze each other in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x))).square().mean()


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_networks_that_train_in_turns_are_left_where_they_are(rank: int, stage: int) -> None:
    model = Turns()
    owner = Zero(stage=stage, dtype="bfloat16", bucket_numel=1).shard(model)  # type: ignore[arg-type]
    pairs = [(model.one, model.two), (model.two, model.one)]
    optimizers = [torch.optim.AdamW(mine.parameters(), lr=0.01) for mine, _ in pairs]
    for optimizer in optimizers:
        ShardedOptimizer(optimizer, owner)
    units = list(owner.units)
    for _ in range(3):
        for (mine, other), optimizer in zip(pairs, optimizers, strict=True):
            other.requires_grad_(False)
            mine.requires_grad_(True)
            before = full_tensor(other.weight, master=True)
            model(torch.ones(2, 6, dtype=torch.bfloat16)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(full_tensor(other.weight, master=True), before)
    assert owner.units == units


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_nothing_moves_and_nothing_is_said_where_nothing_changed(stage: int) -> None:
    model = Turns()
    owner = Zero.model_validate({"stage": stage, "persist_numel": 10**6 if stage == 3 else 0}).shard(model)
    ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), owner)
    units, shards = list(owner.units), [unit.local.data_ptr() for unit in owner.units]
    owner.mesh.log.clear()
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert owner.mesh.log.bytes_by_axis() == {}
    replan(model)
    assert owner.units == units
    assert [unit.local.data_ptr() for unit in owner.units] == shards
    with pytest.raises(LookupError, match="shard the model first"):
        replan(Turns())
