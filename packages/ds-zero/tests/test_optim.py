"""Every torch optimizer over shards equals itself unsharded, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_core.train.optim import ELEMENTWISE, ShardedOptimizer, attached, cut_for
from ds_zero import Zero, full_tensor, shard

KEYWORDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "fused": True},
    "Adafactor": {"lr": 0.01},
}


def make(name: str, params: Any) -> torch.optim.Optimizer:
    kind: Any = getattr(torch.optim, name)
    return kind(params, **KEYWORDS.get(name, {"lr": 0.01}))


class Halving(torch.optim.Optimizer):
    """An optimizer of somebody's own: each matrix steps along its gradient's sign, scaled by its own norm."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (p.grad.norm() + 1e-3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        CASES["mlp"].losses(model, CASES["mlp"].rank_batch(step, rank, ranks))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(make_optimizer: Any) -> None:
    twin = Twin(CASES["mlp"], make_optimizer, ranks=2, zero_unused=False)
    for step in range(3):
        twin.step([CASES["mlp"].make_batch(step, 2)])
    for stage in (1, 3):
        model = CASES["mlp"].build()
        model, optimizer = shard(model, make_optimizer(model), stage=stage)
        train(model, optimizer, 3)
        found = {f"stage {stage}, {name}": full_tensor(p) for name, p in model.named_parameters()}
        expected = {f"stage {stage}, {name}": value for name, value in twin.parameters().items()}
        assert_close_norm(found, expected, 1e-5)


@pytest.mark.parametrize("name", [*sorted(ELEMENTWISE), "Adafactor"])
@distributed(world_size=2)
def test_every_torch_optimizer_equals_itself_unsharded(name: str) -> None:
    compare(lambda model: make(name, model.parameters()))


@distributed(world_size=2)
def test_an_unknown_optimizer_sees_whole_parameters() -> None:
    compare(lambda model: Halving(model.parameters()))


def test_the_table_says_how_each_optimizer_is_cut() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    assert cut_for(torch.optim.AdamW(params)) == "flat"
    assert cut_for(torch.optim.Adafactor(params)) == "whole"
    assert cut_for(Halving(params)) == "whole"
    assert cut_for(type("Mine", (torch.optim.AdamW,), {})(params)) == "whole"
    assert cut_for(type("Said", (torch.optim.AdamW,), {"elementwise": True})(params)) == "flat"
    for name in ("LBFGS", "SparseAdam"):
        with pytest.raises(ValueError, match=f"{name} cannot be sharded.*stage 0"):
            cut_for(make(name, params))


@distributed(world_size=2)
def test_a_flat_cut_is_refused_to_optimizers_that_need_whole_parameters(rank: int) -> None:
    model = CASES["mlp"].build()
    optimizer = Halving(model.parameters())
    owner = Zero(stage=1).shard(model)
    with pytest.raises(ValueError, match='cut="whole"'):
        ShardedOptimizer(optimizer, owner)


@distributed(world_size=2)
def test_groups_keep_number_order_and_options(rank: int) -> None:
    model = CASES["mlp"].build()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decay, "weight_decay": 0.1, "name": "decay"},
        {"params": rest, "lr": 0.5, "name": "rest"},
    ]
    model, optimizer = shard(model, torch.optim.AdamW(groups, lr=0.01), stage=2)
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "rest"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    held = torch.tensor([sum(p.numel() for p in group["params"]) for group in optimizer.param_groups])
    dist.all_reduce(held)
    assert held.tolist() == [sum(p.numel() for p in decay), sum(p.numel() for p in rest)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.05])


@distributed(world_size=1)
def test_what_cannot_be_sharded_is_said(rank: int) -> None:
    model = CASES["mlp"].build()
    with pytest.raises(ValueError, match="not in the model"):
        shard(CASES["mlp"].build(), torch.optim.SGD(model.parameters(), lr=0.1), stage=1)
    with pytest.raises(LookupError, match="not sharded"):
        attached(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="stage"):
        Zero(stage=4)


@distributed(world_size=2)
def test_an_optimizer_that_has_stepped_takes_its_state_along(rank: int) -> None:
    """Train plainly, then sharded: the same as plainly throughout."""
    model, reference = CASES["mlp"].build(), CASES["mlp"].build()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for step in range(3):
        if step == 1:
            model, optimizer = shard(model, optimizer, stage=3)
        batch = CASES["mlp"].make_batch(step, 1)
        for net, adam in ((model, optimizer), (reference, plain)):
            CASES["mlp"].losses(net, batch)[0].backward()
            adam.step()
            adam.zero_grad()
    found = {name: full_tensor(p) for name, p in model.named_parameters()}
    assert_close_norm(found, {n: p.detach() for n, p in reference.named_parameters()}, 1e-5)


@distributed(world_size=2)
def test_a_parameter_left_out_of_the_optimizer_is_named(rank: int) -> None:
    model = CASES["mlp"].build()
    kept = [p for name, p in model.named_parameters() if name != "head.bias"]
    model, optimizer = shard(model, torch.optim.SGD(kept, lr=0.1), stage=3)
    before = full_tensor(model.get_parameter("head.bias"))
    with pytest.warns(UserWarning, match=r"1 trainable parameters .* head\.bias"):
        train(model, optimizer, 1)
    assert torch.equal(full_tensor(model.get_parameter("head.bias")), before)


@distributed(world_size=2)
def test_autocast_over_fp32_parameters_equals_one_process(rank: int) -> None:
    """Both sides compute in bf16 from the same fp32 weights, so gradients agree to fp32 sums."""

    def losses(model: nn.Module, batch: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return CASES["mlp"].losses(model, batch)

    model = CASES["mlp"].build()
    reference = CASES["mlp"].build()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    model, optimizer = shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)
    for step in range(2):
        losses(model, CASES["mlp"].rank_batch(step, rank, 2))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        for part in range(2):
            (losses(reference, CASES["mlp"].rank_batch(step, part, 2))[0] / 2).backward()
        plain.step()
        plain.zero_grad()
    found = {name: full_tensor(p) for name, p in model.named_parameters()}
    assert_close_norm(found, {n: p.detach() for n, p in reference.named_parameters()}, 1e-5)
