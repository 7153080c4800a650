"""Compiled blocks compile once however often parameters come and go, and blocks are chosen in four ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ds_core import ShardedOptimizer
from ds_core.state.forwards import ForwardSwap, choose_blocks
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_zero import Zero, compile_blocks


@distributed(world_size=2)
def test_prefetching_letting_go_and_evaluating_compile_nothing_twice(rank: int) -> None:
    """Small units, none of them kept into the backward; one graph for training and one for evaluation."""
    torch._dynamo.reset()
    counters.clear()
    model = CASES["mlp"].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    owner = Zero(stage=3, bucket_numel=1, keep_numel=0).shard(model)
    compiled = compile_blocks(model, backend="aot_eager")

    sharded = ShardedOptimizer(optimizer, owner)
    for epoch in range(3):
        for step in range(2):
            CASES["mlp"].losses(model, CASES["mlp"].rank_batch(2 * epoch + step, rank, 2))[0].backward()
            sharded.step()
            sharded.zero_grad()
        with torch.no_grad():
            CASES["mlp"].losses(model, CASES["mlp"].rank_batch(0, rank, 2))
        assert counters["stats"]["unique_graphs"] == 2
    assert dict(counters["graph_break"]) == {}
    compiled.remove()
    assert not any("forward" in vars(block) for block in model.modules())


def test_blocks_are_chosen_by_number_pattern_and_function() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
            self.head = nn.Linear(2, 2)

    def chosen(which: Any) -> list[str]:
        model = Plus()
        swap = ForwardSwap().put(choose_blocks(model, which).values(), lambda forward: forward)
        found = [name for name, module in model.named_modules() if "forward" in vars(module)]
        swap.remove()
        swap.remove()
        assert not any("forward" in vars(module) for module in model.modules())
        return found

    assert chosen(None) == [f"layers.{i}" for i in range(5)]
    assert chosen(2) == ["layers.0", "layers.2", "layers.4"]
    assert chosen(r"layers\.[13]|head") == ["layers.1", "layers.3", "head"]
    assert chosen(lambda name, module: name.endswith("4")) == ["layers.4"]
    for nothing in ("absent", lambda name, module: False):
        with pytest.raises(ValueError, match=r"chooses no module; the model's blocks are layers\.0"):
            chosen(nothing)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chosen(0)
    with pytest.raises(ValueError, match="repeats nothing"):
        choose_blocks(nn.Linear(2, 2))
