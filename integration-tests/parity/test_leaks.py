"""A thousand steps leave resident memory where it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_core.testing.distributed import run_ranks
from ds_zero import full_tensor, shard

WARM, STEPS, GROWTH = 200, 1000, 0.01
_STATUS = Path("/proc/self/statm")


def resident() -> int:
    gc.collect()
    return int(_STATUS.read_text().split()[1])


class Model(nn.Module):
    """Trainable, frozen and half-frozen blocks, one of them checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(4))
        self.blocks[1].requires_grad_(False)
        self.blocks[2][0].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:3]:
            x = x + block(x)
        again: torch.Tensor = checkpoint(self.blocks[3], x, use_reentrant=False)
        return again


def train(stage: int) -> None:
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    shard(model, optimizer, stage=stage, dtype=torch.bfloat16)
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    before = 0
    for step in range(STEPS):
        if step == WARM:
            before = resident()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            model.state_dict()
            full_tensor(model.blocks[0][0].weight)
    after = resident()
    assert after <= before * (1 + GROWTH), f"{before} pages after {WARM} steps, {after} after {STEPS}"


@pytest.mark.skipif(not _STATUS.exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_thousand_steps_leak_nothing(stage: int) -> None:
    run_ranks(train, 2, timeout=200.0, stage=stage)
