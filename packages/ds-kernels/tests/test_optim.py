"""The fused classes as torch optimizers: parity, checkpoints both ways, copies, 16 bits, AMP, undo."""

from __future__ import annotations

import copy
import math
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_kernels import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLamb,
    FusedLion,
    FusedOptimizer,
    FusedSGD,
    Muon,
)

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
MOMENTUM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (FusedAdamW, torch.optim.AdamW, SETTINGS),
    (FusedAdam, torch.optim.Adam, SETTINGS),
    (FusedAdagrad, torch.optim.Adagrad, {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    (FusedSGD, torch.optim.SGD, {**MOMENTUM, "dampening": 0.3}),
    (FusedSGD, torch.optim.SGD, {**MOMENTUM, "nesterov": True}),
    (FusedSGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
]
EVERY: list[tuple[Any, dict[str, Any]]] = [
    *((mine, settings) for mine, _, settings in PAIRS),
    (FusedLion, {"lr": 1e-3, "weight_decay": 0.1}),
    (FusedLamb, {"lr": 1e-2, "weight_decay": 0.1}),
]


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(17), nn.Linear(17, 5, bias=False)
    ).to(dtype)


def ready(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = model(dtype)
    made(torch.zeros(1, 3, 6, 6, dtype=dtype))
    return made


def fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)


def close(one: nn.Module, two: nn.Module, bound: float = 1e-6) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).norm() <= bound * b.norm()


def equal(one: nn.Module, two: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("mine", "theirs", "settings"), PAIRS)
def test_hundred_steps_equal_torch(mine: Any, theirs: Any, settings: dict[str, Any]) -> None:
    """Two groups, a parameter that has no gradient at first, and a learning-rate schedule."""
    left, right = ready(), ready()
    optimizers = []
    for kind, module in ((mine, left), (theirs, right)):
        first, *rest = module.parameters()
        groups = [{"params": [first], "weight_decay": 0.0}, {"params": rest, "maximize": True}]
        optimizers.append(kind(groups, **settings))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 100) for o in optimizers]
    for step in range(100):
        for module in (left, right):
            fill(module, step)
            if step < 10:
                next(module.parameters()).grad = None
        for stepper in (*optimizers, *schedules):
            stepper.step()
    close(left, right)
    state = optimizers[0].state[next(left.parameters())]
    assert state.get("step", torch.tensor(90)).item() == 90


@pytest.mark.parametrize(("mine", "theirs", "settings"), PAIRS)
@pytest.mark.parametrize("there", [True, False])
def test_checkpoints_are_interchangeable(
    mine: Any, theirs: Any, settings: dict[str, Any], there: bool
) -> None:
    """Ten steps with one, its state loaded into the other, ten more: the same as twenty with torch's."""
    left, right = ready(), ready()
    first, whole = (
        (mine if there else theirs)(left.parameters(), **settings),
        theirs(right.parameters(), **settings),
    )
    for step in range(20):
        if step == 10:
            saved = copy.deepcopy(first.state_dict())
            first = (theirs if there else mine)(left.parameters(), lr=123.0)
            first.load_state_dict(saved)
        fill(left, step)
        fill(right, step)
        first.step()
        whole.step()
    close(left, right)
    states = [o.state_dict()["state"].get(0, {}) for o in (first, whole)]
    kinds = [{k: (v.dtype, v.shape) for k, v in state.items() if v is not None} for state in states]
    assert kinds[0] == kinds[1]


def test_a_state_of_the_fused_torch_optimizer_loads() -> None:
    left, right = ready(), ready()
    theirs = torch.optim.AdamW(left.parameters(), fused=True, **SETTINGS)
    fill(left, 0)
    theirs.step()
    mine = FusedAdamW(right.parameters(), lr=1.0)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert "fused" not in mine.param_groups[0]
    assert mine.param_groups[0]["lr"] == SETTINGS["lr"]
    right.load_state_dict(left.state_dict())
    fill(left, 1)
    fill(right, 1)
    theirs.step()
    mine.step()
    close(right, left)


def test_amsgrad_state_is_refused() -> None:
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(3))], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        FusedAdamW([nn.Parameter(torch.ones(3))]).load_state_dict(theirs.state_dict())


def test_low_precision_parameters_keep_fp32_moments_through_a_checkpoint() -> None:
    left, right = ready(torch.bfloat16), ready(torch.bfloat16)
    whole, first = (FusedAdamW(m.parameters(), **SETTINGS) for m in (left, right))
    for step in range(6):
        if step == 3:
            saved, first = copy.deepcopy(first.state_dict()), FusedAdamW(right.parameters())
            first.load_state_dict(saved)
            assert (
                saved["state"][0]["exp_avg"].data_ptr()
                != first.state[next(right.parameters())]["exp_avg"].data_ptr()
            )
        for optimizer, module in ((whole, left), (first, right)):
            fill(module, step)
            optimizer.step()
    equal(left, right)
    assert {state[k].dtype for state in first.state.values() for k in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_and_low_precision_gradients(dtype: torch.dtype) -> None:
    """What the ZeRO runtime asks for: fp32 masters, 16-bit gradients and published parameters, some flat."""
    plain, mixed = ready(), ready()
    one, two = FusedAdamW(plain.parameters(), **SETTINGS), FusedAdamW(mixed.parameters(), **SETTINGS)
    for step in range(3):
        fill(plain, step)
        for i, (p, q) in enumerate(zip(plain.parameters(), mixed.parameters(), strict=True)):
            assert p.grad is not None
            low = p.grad.to(dtype)
            p.grad = low.float()
            two.low_precision_grads[q] = low if i % 2 else low.flatten()
            if i != 1:
                two.copy_out[q] = torch.full((q.numel(),), 7.0, dtype=dtype)
        one.step()
        two.step()
    equal(plain, mixed)
    for p, published in two.copy_out.items():
        assert torch.equal(published, p.detach().flatten().to(dtype))
    assert len(two.copy_out) == len(list(mixed.parameters())) - 1


def test_clip_coef_and_grad_scale() -> None:
    """Gradients times 4096 with grad_scale 4096, times 8 with clip_coef 1/8: powers of two, no rounding."""
    plain, scaled, clipped = ready(), ready(), ready()
    optimizers = [FusedAdamW(m.parameters(), **SETTINGS) for m in (plain, scaled, clipped)]
    for step in range(3):
        for module, factor in ((plain, 1.0), (scaled, 4096.0), (clipped, 8.0)):
            fill(module, step)
            for p in module.parameters():
                assert p.grad is not None
                p.grad *= factor
        optimizers[1].grad_scale = torch.tensor(4096.0) if step else 4096.0
        optimizers[2].clip_coef = torch.tensor(0.125) if step else 0.125
        for optimizer in optimizers:
            optimizer.step()
    equal(plain, scaled)
    equal(plain, clipped)


def test_found_inf_changes_nothing() -> None:
    module = ready()
    before = copy.deepcopy(module)
    optimizer = FusedAdamW(module.parameters())
    fill(module, 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    equal(module, before)
    assert not optimizer.state
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.state[next(module.parameters())]["step"].item() == 1


def test_grad_scaler() -> None:
    """torch.amp.GradScaler hands unscaling and skipping over to us, with and without its own unscale_."""
    plain, scaled = ready(), ready()
    one, two = (FusedAdamW(m.parameters(), **SETTINGS) for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        for module, optimizer in ((plain, one), (scaled, two)):
            optimizer.zero_grad()
            loss = module(torch.full((2, 3, 6, 6), 0.1 * (step + 1))).square().mean()
            (scaler.scale(loss) if module is scaled else loss).backward()
        bad = step == 2
        if bad:
            next(scaled.parameters()).grad[0] = math.inf  # type: ignore[index]
        if step == 1:
            scaler.unscale_(two)
        scaler.step(two)
        scaler.update()
        assert (two.grad_scale, two.found_inf) == (1.0, None)
        if not bad:
            one.step()
    assert scaler.get_scale() == 512.0
    equal(plain, scaled)


@pytest.mark.parametrize(("mine", "settings"), EVERY)
def test_undo_takes_a_step_back(mine: Any, settings: dict[str, Any]) -> None:
    """The first step and a later one: what follows is as if they had not been; copies go back too."""
    plain, doubted = ready(torch.bfloat16), ready(torch.bfloat16)
    one, two = mine(plain.parameters(), **settings), mine(doubted.parameters(), **settings)
    for optimizer in (one, two):
        optimizer.state_dtype, optimizer.seed = torch.bfloat16, 11
    two.copy_out = {p: torch.zeros(p.shape, dtype=torch.float16) for p in doubted.parameters()}
    for step in range(3):
        if step != 1:
            fill(doubted, 100 + step)
            two.keep_undo = True
            two.step()
            two.undo()
            two.keep_undo = False
            assert all(torch.equal(p.to(torch.float16), copy) for p, copy in two.copy_out.items())
        for module, optimizer in ((plain, one), (doubted, two)):
            fill(module, step)
            optimizer.step()
        equal(plain, doubted)
    assert one.seed == two.seed == 14
    for p, q in zip(plain.parameters(), doubted.parameters(), strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        assert all(torch.equal(value, two.state[q][name]) for name, value in one.state[p].items())
        assert {value.dtype for name, value in one.state[p].items() if name != "step"} <= {torch.bfloat16}
    with pytest.raises(RuntimeError, match="there is no step to take back"):
        two.undo()


@pytest.mark.parametrize(("mine", "settings"), EVERY)
def test_resuming_draws_what_it_would_have_drawn(mine: Any, settings: dict[str, Any]) -> None:
    """bf16 rounded by chance: saved after three steps and continued, the same bits."""
    left, right = ready(torch.bfloat16), ready(torch.bfloat16)
    whole, first = mine(left.parameters(), **settings), mine(right.parameters(), **settings)
    for optimizer in (whole, first):
        optimizer.state_dtype, optimizer.seed = torch.bfloat16, 3
    for step in range(6):
        if step == 3:
            saved, first = copy.deepcopy(first.state_dict()), mine(right.parameters())
            first.state_dtype = torch.bfloat16
            first.load_state_dict(saved)
        for optimizer, module in ((whole, left), (first, right)):
            fill(module, step)
            optimizer.step()
    equal(left, right)


def test_plain_sgd_keeps_no_state() -> None:
    module = ready()
    optimizer = FusedSGD(module.parameters(), lr=0.1)
    fill(module, 0)
    optimizer.step()
    assert all(not state for state in optimizer.state.values())
    assert isinstance(optimizer, FusedOptimizer)


def test_is_a_torch_optimizer() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([("named", p)], lr=torch.tensor(0.5))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.elementwise is True
    p.grad = torch.ones(3)

    def closure() -> Tensor:
        return p.square().sum()

    assert optimizer.step(closure) == 3.0
    twin = copy.deepcopy(optimizer)
    assert (twin.copy_out, twin.low_precision_grads) == ({}, {})
    twin.step()
    optimizer.zero_grad()
    assert p.grad is None
    assert optimizer.step() is None


def test_bad_input() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="lr=-1"):
        FusedAdamW([p], lr=-1.0)
    with pytest.raises(ValueError, match="float64"):
        FusedAdamW([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="initial_accumulator_value=-1"):
        FusedAdagrad([p], initial_accumulator_value=-1.0)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        FusedSGD([p], nesterov=True)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        FusedAdamW(embedding.parameters()).step()
    optimizer = FusedAdamW([p])
    optimizer.low_precision_grads[p] = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"grads\[0\] is shape \(4,\)"):
        optimizer.step()
    assert not optimizer.state or optimizer.state[p]["step"].item() == 0
    assert torch.equal(p, torch.ones(3))


def test_entry_points() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    found = project["entry-points"]["ds.optimizer"]
    kinds = [EntryPoint(name, value, "ds.optimizer").load() for name, value in found.items()]
    assert kinds == [FusedAdamW, FusedAdam, FusedAdagrad, FusedSGD, FusedLamb, FusedLion, Muon]
    assert [kind.elementwise for kind in kinds] == [True, True, True, True, False, True, False]
