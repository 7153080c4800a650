"""DeepSpeed's names give what DeepSpeed's documentation says of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.testing.distributed import distributed
from ds_zero import Zero, compat, full_tensor, shard


def build(stage: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    shard(model, optimizer, stage=stage, dtype=torch.bfloat16)
    return model, optimizer


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_get_and_set_whole_values(stage: int) -> None:
    model, optimizer = build(stage)
    weight = model[1].weight
    value = torch.linspace(-1, 1, 64).view(8, 8)
    assert compat.safe_get_full_optimizer_state(weight, "exp_avg") is None
    assert compat.safe_get_full_grad(weight) is None
    with pytest.raises(KeyError, match=r"no optimizer keeps a state 'exp_avg' of 1\.weight yet"):
        compat.safe_set_full_optimizer_state(weight, value, "exp_avg")
    with pytest.raises(ValueError, match=r"1\.weight has no gradient to replace"):
        compat.safe_set_full_grad(weight, value)
    compat.safe_set_full_fp32_param(weight, value)
    assert torch.equal(compat.safe_get_full_fp32_param(weight), value)
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    compat.safe_set_full_grad(weight, 2 * value)
    grad = compat.safe_get_full_grad(weight)
    assert grad is not None
    assert torch.equal(grad, 2 * value)
    optimizer.step()
    moment = compat.safe_get_full_optimizer_state(weight, "exp_avg")
    assert moment is not None
    torch.testing.assert_close(moment, 0.2 * value)  # (1 - beta1) times the gradient that was set
    compat.safe_set_full_optimizer_state(weight, value, "exp_avg")
    moment = compat.safe_get_full_optimizer_state(weight, "exp_avg")
    assert moment is not None
    assert torch.equal(moment, value)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_local_values_are_the_parts_of_the_whole(rank: int, stage: int) -> None:
    model, optimizer = build(stage)
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    for param in model.parameters():
        mine, grad = compat.safe_get_local_fp32_param(param), compat.safe_get_local_grad(param)
        counted = torch.tensor([0.0 if mine is None else float(mine.numel())])
        torch.distributed.all_reduce(counted)
        assert int(counted) == param.numel()
        assert (mine is None) == (grad is None)
        if mine is not None:
            assert grad is not None
            assert grad.shape == mine.shape
        whole = compat.safe_get_full_fp32_param(param).reshape(-1)
        if mine is not None:
            assert torch.equal(mine, whole[: len(mine)] if rank == 0 else whole[-len(mine) :])
    assert compat.safe_get_local_optimizer_state(model[0].weight, "exp_avg") is None
    optimizer.step()
    held = compat.safe_get_local_optimizer_state(model[0].weight, "exp_avg")
    assert held is not None or rank == 1


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_gathered_parameters_take_what_the_modifier_wrote(rank: int, stage: int) -> None:
    model, _ = build(stage)
    ordinary = nn.Parameter(torch.ones(2))
    with compat.GatheredParameters([model[0].weight, ordinary], modifier_rank=0):
        if rank == 0:
            nn.init.constant_(model[0].weight, 4.0)
    assert bool((full_tensor(model[0].weight) == 4).all())
    with compat.GatheredParameters([]):
        pass
    with compat.GatheredParameters(model, enabled=False):
        assert stage == 1 or "not whole" in repr(model[0].weight)
    with pytest.raises(LookupError, match="shard the model first"):
        compat.safe_get_full_fp32_param(ordinary)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 4)
        self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_leaf_modules_are_one_unit() -> None:
    def units(model: nn.Module) -> list[int]:
        owner = Zero(stage=3, bucket_numel=1).shard(model)
        return [len(unit.params) for unit in owner.units]

    assert units(nn.Sequential(Routed(), nn.ReLU())) == [2, 2, 2, 2]
    by_class, by_name, by_suffix, unset = (nn.Sequential(Routed(), nn.ReLU()) for _ in range(4))
    assert compat.set_z3_leaf_modules(by_class, [Routed]) == [by_class[0]]
    assert compat.set_z3_leaf_modules(by_class, ["Routed"]) == [by_class[0]]
    assert compat.get_z3_leaf_modules(by_class) == [by_class[0]]
    assert units(by_class) == [8]
    assert compat.set_z3_leaf_modules_by_name(by_name, ["0.ways"]) == [by_name[0].ways]
    assert units(by_name) == [2, 6]
    compat.set_z3_leaf_modules_by_suffix(by_suffix, ["ways"])
    assert units(by_suffix) == [2, 6]
    compat.set_z3_leaf_modules(unset, [Routed])
    assert compat.unset_z3_leaf_modules(unset, [Routed]) == [unset[0]]
    assert not compat.z3_leaf_module(unset[0])
    assert units(unset) == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"no module of \['Nothing'\]"):
        compat.set_z3_leaf_modules(unset, ["Nothing"])
