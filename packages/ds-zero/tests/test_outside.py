"""A weight that is read outside of its module: gathered there, and there until the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_core.state.absent import AbsentParameterError
from ds_core.state.unit import Whole
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero, full_tensor


class Fused(nn.Module):
    """Its head is never called: the loss takes the head's weight, as fused linear cross-entropies do."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ self.head.weight.t(), y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.body(x).tanh()
        if self.how == "plain":
            return self.loss(x, y)
        return checkpoint(self.loss, x, y, use_reentrant=self.how == "reentrant")


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    seed = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 8, generator=seed), torch.randint(0, 5, (4,), generator=seed)


def sharded(how: str) -> tuple[nn.Module, ShardedOptimizer]:
    torch.manual_seed(0)
    model = Fused(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, ShardedOptimizer(optimizer, Zero(stage=3, bucket_numel=1, keep_numel=0).shard(model))


@pytest.mark.parametrize("how", ["plain", "reentrant", "non_reentrant"])
@distributed(world_size=2)
def test_it_trains_as_the_twin(how: str, rank: int) -> None:
    model, optimizer = sharded(how)
    torch.manual_seed(0)
    twin = Fused(how)
    plain = torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in range(3):
        loss = model(*batch(step, rank))
        with torch.no_grad():  # a reference pass in between, as in preference training
            model(*batch(step, 1 - rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for other in range(2):
            (twin(*batch(step, other)) / 2).backward()
        plain.step()
        plain.zero_grad()
    assert float(twin.head.weight.detach().std()) > 0.1
    found = {name: full_tensor(param) for name, param in model.named_parameters()}
    assert_close_norm(found, {name: param.detach() for name, param in twin.named_parameters()}, 1e-6)


@distributed(world_size=2)
def test_it_goes_when_nobody_needs_it(rank: int) -> None:
    model, optimizer = sharded("plain")
    unit = optimizer.owner.place(model.head.weight)[0]
    with torch.no_grad():
        model(*batch(0, rank))
    assert unit.state is Whole.ABSENT
    loss = model(*batch(0, rank))
    assert unit.state is Whole.READY
    loss.backward()
    assert unit.state is Whole.ABSENT
    model(*batch(0, rank))  # a graph that nobody goes back through
    assert unit.pinned == 1
    optimizer.step()
    assert (unit.state, unit.pinned) == (Whole.ABSENT, 0)


@distributed(world_size=2)
def test_outside_of_any_forward_it_raises() -> None:
    model, _ = sharded("plain")
    with pytest.raises(AbsentParameterError, match=r"head.weight is sharded.*full_tensor"):
        model.head.weight.sum()


@distributed(world_size=2)
def test_two_graphs_that_read_it_go_backward_one_by_one(rank: int) -> None:
    model, optimizer = sharded("plain")
    torch.manual_seed(0)
    twin = Fused()
    losses = [model(*batch(seed, rank)) for seed in (0, 1)]
    for loss in losses:
        (loss / 2).backward()
    optimizer.step()
    for seed in (0, 1):
        for other in range(2):
            (twin(*batch(seed, other)) / 4).backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    found = {name: full_tensor(param) for name, param in model.named_parameters()}
    assert_close_norm(found, {name: param.detach() for name, param in twin.named_parameters()}, 1e-6)
