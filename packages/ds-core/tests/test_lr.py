"""Schedules against formulas and hand-computed sequences; state as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from ds_core.state.shard import Saveable, SavedTensor
from ds_core.train import lr
from ds_core.train.schedule import SCHEDULES, SaveableSchedule, build_schedule, saveable, torch_schedules


def optimizer(kind: type[Optimizer] = AdamW, rates: tuple[float, ...] = (0.1,)) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return kind(groups, lr=0.1)  # type: ignore[call-arg]


def run(schedule: Any, steps: int) -> list[float]:
    """The rate each of the first `steps` optimizer steps uses."""
    seen = []
    for _ in range(steps):
        seen.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return seen


def test_lr_range_test_by_hand() -> None:
    smooth = lr.LRRangeTest(optimizer(), 1.0, lr_range_test_step_size=4, lr_range_test_step_rate=2.0)
    assert run(smooth, 5) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])  # [0] is the lowest rate itself
    stairs = lr.LRRangeTest(optimizer(), 1.0, 2, 1.0, True)
    assert run(stairs, 6) == pytest.approx([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])


def test_warmup_uses_its_lowest_rate_twice() -> None:
    linear = lr.WarmupLR(optimizer(), 0.0, 1.0, warmup_num_steps=4, warmup_type="linear")
    assert run(linear, 7) == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    log = lr.WarmupLR(optimizer(), 0.5, 1.5, warmup_num_steps=8)
    want = [0.5, 0.5] + [0.5 + math.log(n) / math.log(8) for n in range(2, 9)] + [1.5]
    assert run(log, 10) == pytest.approx(want)


def test_warmup_has_at_least_two_steps() -> None:
    assert run(lr.WarmupLR(optimizer(), 0.0, 1.0, 1, "linear"), 4) == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_plain_functions_of_the_step() -> None:
    assert [lr.warmup(step, 1, kind="linear") for step in (-1, 0, 1, 2)] == [0.0, 0.0, 0.5, 1.0]
    assert lr.warmup_decay(5, 10, 0, kind="linear") == 5 / 8
    assert lr.warmup_cosine(-1, 10, 2, min_ratio=0.5) == 0.0
    assert lr.warmup_cosine(99, 10, 2, cos_min_ratio=0.2) == pytest.approx(0.2)
    assert lr.lr_range_test(3, 1.0, step_size=4, staircase=True) == 2.0
    assert lr.cycle_position(1, 4, 4) == 0.5


def test_warmup_goes_to_the_optimizers_own_rate_by_default() -> None:
    schedule = lr.WarmupLR(optimizer(rates=(0.3, 0.7)), warmup_num_steps=2)
    assert schedule.get_last_lr() == [0.0, 0.0]
    schedule.optimizer.step()
    schedule.step(5)
    assert schedule.get_last_lr() == pytest.approx([0.3, 0.7])


def test_warmup_decay_by_hand() -> None:
    schedule = lr.WarmupDecayLR(optimizer(), 6, 0.0, 1.0, 2, "linear")
    assert run(schedule, 9) == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_warmup_cosine_by_formula() -> None:
    schedule = lr.WarmupCosineLR(optimizer(rates=(2.0,)), 10, 0.1, 2, 0.2, "linear")
    want = [0.0, 0.2, 1.1]  # exactly zero first, then min_ratio, then half way to 1
    want += [2.0 * (0.2 + 0.8 * (1 + math.cos(math.pi * min(1.0, n / 8))) / 2) for n in range(1, 11)]
    assert run(schedule, 13) == pytest.approx(want)
    assert want[-1] == want[-2] == pytest.approx(0.4)  # stays at the floor


def test_one_cycle_by_hand() -> None:
    schedule = lr.OneCycle(optimizer(), 0.0, 1.0, cycle_first_step_size=4, cycle_second_step_size=2)
    assert run(schedule, 8) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0])
    schedule = lr.OneCycle(
        optimizer(), 1.0, 2.0, decay_lr_rate=0.5, cycle_first_step_size=1, decay_step_size=2
    )
    # up 1, down 1 (the foot of the next triangle still counts as inside), then 1 / (1 + 0.5 * n / 2)
    assert run(schedule, 6) == pytest.approx([1.0, 2.0, 1.0, 1 / 1.25, 1 / 1.5, 1 / 1.75])


def test_one_cycle_moves_momentum_the_other_way() -> None:
    adam = optimizer()
    schedule = lr.OneCycle(
        adam, 0.0, 1.0, cycle_first_step_size=2, cycle_min_mom=0.8, cycle_max_mom=0.9,
        decay_step_size=1, decay_mom_rate=0.1,
    )  # fmt: skip
    seen = []
    for _ in range(6):
        seen.append(adam.param_groups[0]["betas"])
        adam.step()
        schedule.step()
    assert [beta2 for _, beta2 in seen] == [0.99] * 6
    # before the first step DeepSpeed sets the lowest momentum; from then on high while the rate is low
    assert [beta1 for beta1, _ in seen] == pytest.approx([0.8, 0.85, 0.8, 0.85, 0.9, 0.9 * 1.1])


def test_one_cycle_stairs() -> None:
    schedule = lr.OneCycle(optimizer(), 0.0, 1.0, cycle_first_step_size=4, cycle_first_stair_count=2)
    assert run(schedule, 9) == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.0, 0.0])


def test_one_cycle_without_betas_says_so(caplog: pytest.LogCaptureFixture) -> None:
    schedule = lr.OneCycle(optimizer(SGD), 0.0, 1.0)
    assert schedule.get_mom() is None
    assert "SGD has no betas" in caplog.text


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_state_is_json_and_resumes(name: str) -> None:
    params: dict[str, Any] = {
        "LRRangeTest": {"lr_range_test_step_size": 3},
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 3},
        "WarmupLR": {"warmup_num_steps": 5},
        "WarmupDecayLR": {"total_num_steps": 9, "warmup_num_steps": 5},
        "WarmupCosineLR": {"total_num_steps": 9, "warmup_num_steps": 5},
    }[name]
    straight = build_schedule(name, optimizer(), params)
    want = run(straight, 8)
    first = build_schedule(name, optimizer(), params)
    run(first, 4)
    saved = json.loads(json.dumps(first.state_dict()))
    second = build_schedule(name, optimizer(), params)
    assert isinstance(second, Saveable)
    assert second.load_targets({}) == {}
    second.load_state_dict(saved)
    assert run(second, 4) == pytest.approx(want[4:], rel=1e-15)
    assert second.optimizer.param_groups[0]["betas"] == straight.optimizer.param_groups[0]["betas"]


def test_schedules_are_torch_schedulers() -> None:
    schedule = build_schedule("WarmupLR", optimizer(rates=(0.1, 0.2)), {"warmup_num_steps": 2})
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.get_last_lr() == [0.0, 0.0]
    for _ in range(4):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("StepLR", {"step_size": 2}),
        ("MultiStepLR", {"milestones": [2, 5]}),
        ("CosineAnnealingLR", {"T_max": 6}),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 12}),
        ("LinearLR", {"total_iters": 5}),
    ],
)
def test_torch_schedules_by_name_resume(name: str, params: dict[str, Any]) -> None:
    want = run(build_schedule(name, optimizer(), params), 10)
    first = build_schedule(name, optimizer(), params)
    run(first, 4)
    saved = json.loads(json.dumps(first.state_dict()))
    second = build_schedule(name, optimizer(), params)
    second.load_state_dict(saved)
    assert run(second, 6) == pytest.approx(want[4:], rel=1e-15)
    assert len(set(want)) > 1


def test_saveable_wraps_only_what_needs_it() -> None:
    ours = build_schedule("WarmupLR", optimizer())
    assert saveable(ours) is ours
    theirs = torch.optim.lr_scheduler.StepLR(optimizer(), 1)
    assert isinstance(saveable(theirs), SaveableSchedule)
    assert saveable(theirs).gamma == 0.1


def test_unsaveable_state_is_named() -> None:
    class Curve:
        def __call__(self, step: int) -> float:
            return 1.0

    curve = Curve()
    curve.table = object()  # type: ignore[attr-defined]
    wrapped = saveable(torch.optim.lr_scheduler.LambdaLR(optimizer(), curve))
    with pytest.raises(ValueError, match=r"LambdaLR\.lr_lambdas\[0\]\.table is a object"):
        wrapped.state_dict()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmUpLR", {}, r'no scheduler "WarmUpLR"; known: .*WarmupLR'),
        ("ReduceLROnPlateau", {}, "steps on a metric"),
    ],
)
def test_unknown_names(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(LookupError, match=message):
        build_schedule(name, optimizer(), params)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupLR", {"warmup_steps": 3}, "does not take .*warmup_steps"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps is 0; it must be a positive integer"),
        ("WarmupLR", {"warmup_type": "cubic"}, 'warmup_type is .cubic.; allowed: "log", "linear"'),
        ("WarmupLR", {"warmup_min_lr": [0.1, 0.2]}, "2 values for 1 parameter groups"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "positive integer"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_second_step_size": -1}, "not be negative"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(name, optimizer(), params)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    schedule = build_schedule("WarmupLR", optimizer())
    with pytest.raises(ValueError, match=r"keeps no tensors, but the checkpoint has \['w'\]"):
        schedule.load_targets({"w": SavedTensor(torch.Size([1]), torch.float32)})
    with pytest.raises(ValueError, match="last_batch_iteration"):
        schedule.load_state_dict({})


def test_torch_schedules_are_found() -> None:
    assert {"CosineAnnealingLR", "StepLR", "LambdaLR"} <= set(torch_schedules())
