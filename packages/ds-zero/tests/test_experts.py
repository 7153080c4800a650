"""Experts that are a model's outermost container: each rank runs others, or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero, full_tensor


class Mixture(nn.Module):
    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.name = name
        self.inp = nn.Linear(4, 4)
        self.add_module(name, nn.ModuleList(nn.Linear(4, 4) for _ in range(4)))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, chosen: list[int]) -> Tensor:
        x = self.inp(x)
        experts = getattr(self, self.name)
        return self.out(x + sum((experts[index](x) for index in chosen), torch.zeros_like(x)))


def routes(step: int, rank: int) -> list[int]:
    return [[0, 2], [], [3], [1, 1, 0]][(step + rank) % 4]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["experts", "ways"])
@distributed(world_size=2, timeout=90.0)
def test_no_rank_waits_for_an_expert_that_is_not_its_own(stage: int, name: str, rank: int) -> None:
    torch.manual_seed(0)
    model, twin = Mixture(name), Mixture(name)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    leaves = () if name == "experts" else (name,)
    ShardedOptimizer(optimizer, Zero(stage=stage, bucket_numel=1, leaves=leaves).shard(model))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(5):
        rows = [torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        model(rows[rank], routes(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for other in range(2):
            (twin(rows[other], routes(step, other)).square().mean() / 2).backward()
        plain.step()
        plain.zero_grad()
    found = {key: full_tensor(param) for key, param in model.named_parameters()}
    assert_close_norm(found, {key: param.detach() for key, param in twin.named_parameters()}, 1e-6)
