"""Which parameters travel together."""

from __future__ import annotations

import pytest
from torch import nn

from ds_core.state.units import UnitPlan, plan_units
from ds_core.testing.models import CASES


def names(plan: UnitPlan) -> list[str]:
    return [name for name, _ in plan.params]


@pytest.mark.parametrize("bucket", [1, 50, 10**9])
@pytest.mark.parametrize("case", list(CASES))
def test_every_parameter_is_in_one_unit_of_its_kind(case: str, bucket: int) -> None:
    model = CASES[case].build()
    plans = plan_units(model, bucket_numel=bucket)
    found = [name for plan in plans for name in names(plan)]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    modules = dict(model.named_modules())
    for plan in plans:
        assert all(p.dtype == plan.dtype and p.requires_grad == plan.trainable for _, p in plan.params)
        assert all(user in modules for user in plan.users)
    if bucket == 10**9:
        assert len(plans) == len({(plan.dtype, plan.trainable) for plan in plans})


def test_blocks_stay_whole_and_leaves_split() -> None:
    plans = plan_units(CASES["mlp"].build(), bucket_numel=1)
    assert [plan.users for plan in plans] == [
        ("inp",),
        ("blocks.0",),
        ("blocks.1",),
        ("blocks.2",),
        ("head",),
    ]


def test_tied_weight_has_both_users() -> None:
    plans = plan_units(CASES["tied"].build(), bucket_numel=1)
    assert plans[0].users == ("embed", "head")
    assert names(plans[0]) == ["embed.weight"]


def test_neighbours_below_the_bucket_size_are_put_together() -> None:
    plans = plan_units(CASES["mlp"].build(), bucket_numel=300)
    assert [plan.users for plan in plans] == [("inp", "blocks.0", "blocks.1"), ("blocks.2", "head")]
    assert all(plan.numel >= 300 for plan in plans[:-1])


def test_a_module_with_parameters_and_children_is_one_unit() -> None:
    """nn.MultiheadAttention reads its child's weight without calling the child."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    plans = plan_units(model, bucket_numel=1)
    assert [plan.users for plan in plans] == [("attention",), ("head",)]


def test_root_parameters_beside_blocks_are_used_by_the_root() -> None:
    model = CASES["odd"].build()
    plans = plan_units(model, bucket_numel=1)
    assert plans[0].users == ("",)
    assert names(plans[0]) == ["temperature", "shift"]


def test_experts_inside_a_block_are_not_cut_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    plans = plan_units(nn.Sequential(Block(), Block()), bucket_numel=1)
    assert [plan.users for plan in plans] == [("0",), ("1",)]


def test_bucket_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1 element, got 0"):
        plan_units(nn.Linear(1, 1), bucket_numel=0)


class Routed(nn.Module):
    """Experts in a container of their own, of which a forward runs some."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.inp = nn.Linear(4, 4)
        self.inner.add_module(name, nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))


def test_experts_are_one_unit_of_the_module_that_routes() -> None:
    plans = plan_units(Routed("experts"), bucket_numel=1)
    assert [(plan.key, plan.users) for plan in plans] == [
        ("inner.inp.weight", ("inner.inp",)),
        ("inner.experts.0.weight", ("inner",)),
    ]


def test_leaves_are_never_split() -> None:
    assert len(plan_units(Routed("ways"), bucket_numel=1)) == 4
    plans = plan_units(Routed("ways"), bucket_numel=1, leaves=["*.ways"])
    assert [plan.users for plan in plans] == [("inner.inp",), ("inner",)]
    assert [plan.users for plan in plan_units(Routed("ways"), bucket_numel=1, leaves=["inner"])] == [
        ("inner",)
    ]
