"""A share on the device is whole units, and everything of their update is there."""

from __future__ import annotations

import torch
from torch import nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.optim import ShardedOptimizer
from ds_offload import TieredStore


def test_gradients_stay_where_their_unit_is_updated() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters())
    store = TieredStore(masters="0.5 device / 0.5 host", moments="0.5 device / 0.5 host", grads="host")
    owner = ReplicatedOwner(model, store=store, bucket_numel=300)
    sharded = ShardedOptimizer(optimizer, owner)
    model(torch.ones(2, 16)).sum().backward()
    sharded.show_grads()
    here = [unit.key for unit in owner.units if store.stays(f"{unit.key}/master", unit.layout.shard_numel)]
    assert 0 < len(here) < len(owner.units)
    for unit in owner.units:
        assert (store.home_of(f"{unit.key}/grad") is None) == (unit.key in here)
        assert unit.gradient is not None
        assert unit.gradient.untyped_storage().resizable() == (unit.key in here)
    sharded.step()
