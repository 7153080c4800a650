"""The sharded average equals torch's on whole tensors, changes places with the masters, and is resharded."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ds_core import CheckpointStore, DynamicScale, Engine
from ds_core.state.shard import AnnouncesChange, Saveable
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.models import CASES
from ds_core.train.optim import ShardedOptimizer, attached
from ds_zero import EMA, full_tensor, gather, shard

DECAY = 0.9


def build(
    stage: int, case: str = "odd", dtype: torch.dtype | None = None
) -> tuple[nn.Module, EMA, Optimizer]:
    model = CASES[case].build()
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = shard(model, torch.optim.AdamW(trainable, lr=0.05), stage=stage, dtype=dtype)
    return model, EMA(model, DECAY), optimizer


def step(case: str, model: nn.Module, optimizer: Optimizer, seed: int, rank: int, world: int) -> None:
    CASES[case].losses(model, CASES[case].rank_batch(seed, rank, world))[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p, master=p.requires_grad) for name, p in model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@distributed(world_size=2)
def test_it_equals_the_unsharded_average_bit_for_bit(rank: int, world: int) -> None:
    for stage in (0, 1, 2, 3):
        for case in ("odd", "frozen"):
            for dtype in (None, torch.bfloat16):
                compare_with_torch(case, stage, dtype, rank, world)


def compare_with_torch(case: str, stage: int, dtype: torch.dtype | None, rank: int, world: int) -> None:
    """torch's own average on whole tensors follows the same masters; odd sizes cut through every vector."""
    model, ema, optimizer = build(stage, case, dtype)
    plain = CASES[case].build()
    plain.load_state_dict(masters(model))
    reference = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    reference.update_parameters(plain)  # torch's first update is the copy
    for seed in range(4):
        step(case, model, optimizer, seed, rank, world)
        plain.load_state_dict(masters(model))
        reference.update_parameters(plain)
    assert ema.updates == 4
    own = masters(model)
    average = {name: p.detach() for name, p in reference.module.named_parameters()}
    with ema.applied():
        same(masters(model), average)
        rounded = {n: p.to(full_tensor(model.get_parameter(n)).dtype) for n, p in average.items()}
        same({n: full_tensor(p) for n, p in model.named_parameters()}, rounded)
    same(masters(model), own)


def leave_by_an_error(model: nn.Module, ema: EMA) -> None:
    with ema.applied():
        CASES["odd"].losses(model, CASES["odd"].make_batch(9, 1))
        raise KeyError("of the body")


@distributed(world_size=2)
def test_a_body_that_raises_leaves_everything_as_it_was(rank: int, world: int) -> None:
    for stage in (0, 1, 3):
        make_excursions(stage, rank, world)


def make_excursions(stage: int, rank: int, world: int) -> None:
    """Two runs, one with excursions to the average in the middle, end in the same bits."""
    ends = []
    for excursions in (False, True):
        model, ema, optimizer = build(stage, dtype=torch.bfloat16)
        for seed in range(3):
            step("odd", model, optimizer, seed, rank, world)
            if excursions:
                with pytest.raises(KeyError, match="of the body"):
                    leave_by_an_error(model, ema)
        ends.append(masters(model))
        with ema.applied():
            ends.append(masters(model))
    same(ends[0], ends[2])
    same(ends[1], ends[3])
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_what_would_train_or_mix_the_averages_is_refused(stage: int, rank: int, world: int) -> None:
    model, ema, optimizer = build(stage)
    step("odd", model, optimizer, 0, rank, world)
    own = masters(model)
    CASES["odd"].losses(model, CASES["odd"].rank_batch(1, rank, world))[0].backward()
    with ema.applied():
        with pytest.raises(RuntimeError, match="train the averaged weights"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="a second time"), ema.applied():
            pytest.fail("entered")
        for refused in (ema.update, ema.state_dict):
            with pytest.raises(RuntimeError, match="leave the block"):
                refused()
    same(masters(model), own)
    optimizer.step()  # the gradient from before is still there
    assert ema.updates == 2
    assert not torch.equal(masters(model)["head.weight"], own["head.weight"])


@distributed(world_size=2)
def test_a_skipped_step_does_not_count(rank: int, world: int) -> None:
    model, ema, optimizer = build(3, dtype=torch.float16)
    sharded = attached(optimizer)
    engine = Engine(model, sharded.owner, sharded, scaler=DynamicScale(2.0**40))
    reports = [
        engine.train_batch(
            [CASES["odd"].rank_batch(seed, rank, world)], lambda m, b: CASES["odd"].losses(m, b)[0]
        )
        for seed in range(3)
    ]
    assert [report.skipped for report in reports] == [True] * 3
    with ema.applied():
        pass
    assert ema.updates == 0


def saved_at_two(folder: str, rank: int, world: int) -> None:
    model, ema, optimizer = build(3)
    for seed in range(3):
        step("odd", model, optimizer, seed, rank, world)
    store = CheckpointStore(folder)
    store.save(1, {"model": ema.owner, "ema": ema}, block=False)
    step("odd", model, optimizer, 3, rank, world)  # the save in the background has its own copy by now
    store.save(2, {"model": ema.owner, "ema": ema})


def loaded_elsewhere(folder: str, rank: int, world: int, stage: int) -> dict[str, list[float]]:
    found = {}
    for number in (1, 2):
        model, ema, _ = build(stage)
        CheckpointStore(folder).load({"model": ema.owner, "ema": ema}, number, verify=True)
        found[f"updates {number}"] = [float(ema.updates)]
        with ema.applied():
            found |= {f"{number}/{n}": v.flatten().tolist() for n, v in masters(model).items()}
    return found


def test_a_checkpoint_is_read_back_at_any_world_and_stage(tmp_path: Path) -> None:
    run_ranks(saved_at_two, 2, folder=str(tmp_path))
    expected = run_ranks(loaded_elsewhere, 1, folder=str(tmp_path), stage=3)[0]
    assert expected["updates 1"] == [3.0]
    assert expected["1/head.weight"] != expected["2/head.weight"]
    for world, stage in ((3, 1), (2, 0)):
        assert run_ranks(loaded_elsewhere, world, folder=str(tmp_path), stage=stage) == [expected] * world


@distributed(world_size=2)
def test_each_rank_keeps_its_part_and_no_more(rank: int, world: int) -> None:
    _, ema, _ = build(3)
    parts = sum(unit.layout.shard_numel for unit in ema.owner.trainable)
    assert ema._store.bytes_by_tier() == {"device": 4 * parts}
    assert isinstance(ema, Saveable)
    assert isinstance(ema, AnnouncesChange)


@distributed(world_size=2)
def test_an_average_rests_while_its_parameter_is_frozen(rank: int, world: int) -> None:
    for stage in (0, 1, 3):
        freeze_and_thaw(stage, rank, world)


def freeze_and_thaw(stage: int, rank: int, world: int) -> None:
    """Frozen between two steps, thawed again, and one parameter new: as a dict of averages would have it."""
    model, ema, optimizer = build(stage, "mlp")
    block = model.get_submodule("blocks.1")
    expected = masters(model)
    for seed in range(8):
        if seed in (2, 5):
            block.requires_grad_(seed == 5)
        if seed == 6:
            fresh = nn.Parameter(torch.full((5,), 0.5))
            block.register_parameter("fresh", fresh)
            optimizer.add_param_group({"params": [fresh]})
            expected["blocks.1.fresh"] = fresh.detach().clone()
        step("mlp", model, optimizer, seed, rank, world)
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        own = {name: full_tensor(p, master=name in training) for name, p in model.named_parameters()}
        for name in training:
            expected[name].lerp_(own[name], 1.0 - DECAY)
        with ema.applied():
            shown = {name: full_tensor(p) for name, p in model.named_parameters()}
        same(shown, {name: expected[name] if name in training else own[name] for name in own})
    assert len(training) == 23
    with ema.applied():
        block.requires_grad_(False)
        full = CASES["mlp"].rank_batch(0, rank, world)
        CASES["mlp"].losses(model, full)
        block.requires_grad_(True)
        block.register_parameter("late", nn.Parameter(torch.zeros(3)))
        with pytest.raises(RuntimeError, match="change the model's parameters inside"):
            CASES["mlp"].losses(model, full)
        del block._parameters["late"]


@distributed(world_size=2)
def test_dropping_it_ends_it(rank: int, world: int) -> None:
    model, ema, optimizer = build(3)
    gone = weakref.ref(ema)
    with ema.applied():
        pass
    del ema
    gc.collect()
    assert gone() is None
    step("odd", model, optimizer, 0, rank, world)


@distributed(world_size=1)
def test_bad_input_is_said(rank: int, world: int) -> None:
    model = CASES["mlp"].build()
    with pytest.raises(LookupError, match="shard the model first"):
        EMA(model)
    model, first = shard(model, torch.optim.SGD(model.get_submodule("inp").parameters(), lr=0.1), stage=1)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="below 1, got"):
            EMA(model, decay)
    warm = EMA(model, lambda updates: min(0.99, (1 + updates) / (10 + updates)))
    rest = [p for name, p in model.named_parameters() if not name.startswith("inp.")]
    second = ShardedOptimizer(torch.optim.SGD(rest, lr=0.1), warm.owner)
    with pytest.raises(ValueError, match=r"2 optimizers step on this model.*after="):
        EMA(model)
    later = EMA(model, after=second)
    step("mlp", model, first, 0, rank, world)
    assert (warm.updates, later.updates) == (1, 0)
    low = CASES["mlp"].build().bfloat16()
    low, _ = shard(low, torch.optim.SGD(low.parameters(), lr=0.1), stage=1)
    with pytest.raises(ValueError, match="keeps fp32 masters"):
        EMA(low)


@distributed(world_size=2)
def test_a_write_that_would_be_lost_is_named_before_the_averages_come(rank: int, world: int) -> None:
    model, ema, _ = build(1)
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
    with pytest.raises(RuntimeError, match=r"head\.weight was written in place"), ema.applied():
        pytest.fail("entered")
    with gather(head, write=0):
        torch.nn.init.ones_(head.weight)
    with ema.applied():
        assert not bool((full_tensor(head.weight) == 1).all())
    assert bool((full_tensor(head.weight) == 1).all())
