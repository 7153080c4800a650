"""The table of what goes with what: its shape, its page, and that it refuses."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from ds_core import DynamicScale, Engine, ReplicatedOwner, ShardedOptimizer, checkpoint_blocks
from ds_core.ground.codec import CastCodec
from ds_core.limits import APART, FEATURES, STAGES, Cell, at_stage, combos, page, refuse, together
from ds_core.state.forwards import swapped_in
from ds_core.testing.models import CASES


def test_a_cell_has_a_test_or_a_reason() -> None:
    assert Cell("file::test").works
    assert not Cell(why="because").works
    for cell in ({}, {"test": "file::test", "why": "because"}):
        with pytest.raises(ValueError, match="a test or a reason"):
            Cell(**cell)
    for feature in FEATURES.values():
        assert len(feature.stages) == len(STAGES)
    assert all(pair <= FEATURES.keys() for pair in APART)


def test_refusing_says_which_and_why() -> None:
    refuse(3, ["bf16", "tied", "frozen", "persist"])
    with pytest.raises(
        ValueError, match=r"persist does not go with stage 2: its parameters are whole all the"
    ):
        refuse(2, ["bf16", "persist"])
    with pytest.raises(ValueError, match="bf16 does not go with fp16: parameters are cast to one dtype"):
        refuse(1, ["fp16", "bf16"])
    with pytest.raises(KeyError, match="no such thing"):
        refuse(1, ["no such thing"])
    with pytest.raises(KeyError, match="two different features"):
        together("tied", "tied")


def test_combinations_are_all_that_works() -> None:
    for stage in STAGES:
        here = [name for name in FEATURES if at_stage(name, stage).works]
        pairs = [pair for pair in combinations(here, 2) if together(*pair).works]
        assert len(list(combos(stage))) == len(here) + len(pairs)
    assert frozenset({"tied", "frozen"}) in set(combos(3))


def test_the_page_has_a_row_for_each_feature_and_each_reason() -> None:
    text = page()
    for name, feature in FEATURES.items():
        assert f"| {name} | {feature.what} | " in text
        for cell in feature.stages:
            assert cell.works or cell.why in text
    for why in APART.values():
        assert why in text


def test_what_an_owner_sees() -> None:
    model = CASES["tied"].build()
    model.get_parameter("norm.bias").requires_grad_(False)
    owner = ReplicatedOwner(model, dtype="bfloat16", reduce=CastCodec(torch.float32), cut="whole")
    assert owner.features == {"bf16", "tied", "frozen", "reduce codec", "whole cut"}
    assert ReplicatedOwner(CASES["mlp"].build()).features == {"fp32"}
    model = CASES["mlp"].build()
    again = checkpoint_blocks(model)
    owner = ReplicatedOwner(model, dtype="float16", keep_fp32=("*norm*",), leaves=("blocks",))
    assert owner.features == {"fp16", "keep_fp32", "leaves", "recompute"}
    again.remove()
    assert swapped_in(model) == set()
    assert ReplicatedOwner(CASES["mixed_dtypes"].build()).features == set()
    assert ReplicatedOwner(CASES["mlp"].build().to(torch.bfloat16)).features == {"bf16"}


def test_every_no_of_stage_zero_is_refused_when_joined() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="meta does not go with stage 0: it shards nothing"):
        ReplicatedOwner(model)
    with pytest.raises(ValueError, match="gather codec does not go with stage 0: it gathers no parameters"):
        ReplicatedOwner(nn.Linear(3, 3), gather=CastCodec(torch.bfloat16))
    for dtype in (None, "bfloat16"):
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters())
        owner = ReplicatedOwner(model, dtype=dtype)
        with pytest.raises(ValueError, match="for fp16 only"):
            Engine(model, owner, ShardedOptimizer(optimizer, owner), scaler=DynamicScale())
