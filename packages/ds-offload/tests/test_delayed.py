"""The delayed update equals its recurrence, bit for bit, and is another training than the plain one."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core.train.clip import clip_grad_norm_
from ds_core.train.engine import Engine
from ds_offload import park, unpark

sys.path.insert(0, str(Path(__file__).parent))

from overlap_cases import OPTIMIZERS, WIDTH, Run, assert_same

TIERS = ["host", "nvme", "0.5 host / 0.5 nvme"]


def delayed(tmp_path: Path, tier: str = "host", **settings: Any) -> dict[str, Any]:
    tiers = {"masters": tier, "moments": tier, "grads": tier}
    return {
        "nvme": str(tmp_path),
        **tiers,
        "chunk_numel": 4096,
        "update": "delayed",
        "delay_after": 2,
        **settings,
    }


class Reference:
    """The recurrence in plain PyTorch: `shown` computes, `true` has every update."""

    def __init__(self, optimizer: str, dtype: torch.dtype | None, delay_after: int, layers: int = 6) -> None:
        torch.manual_seed(0)
        stack: list[nn.Module] = []
        for _ in range(layers):
            stack += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        self.true = nn.Sequential(*stack)
        self.shown = copy.deepcopy(self.true).to(dtype or torch.float32)
        self.optimizer = OPTIMIZERS[optimizer](self.true.parameters())
        self.steps, self.delay_after = 0, delay_after

    def loss(self, seed: int, scale: float = 1.0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(8, WIDTH, generator=draw).to(next(self.shown.parameters()).dtype)
        return self.shown(x).float().square().mean() * scale

    def publish(self) -> None:
        with torch.no_grad():
            for shown, true in zip(self.shown.parameters(), self.true.parameters(), strict=True):
                shown.copy_(true)

    def step(self, factor: float = 1.0) -> None:
        self.steps += 1
        self.publish()
        for shown, true in zip(self.shown.parameters(), self.true.parameters(), strict=True):
            assert shown.grad is not None
            true.grad = shown.grad.to(true.dtype) * factor
            shown.grad = None
        self.optimizer.step()
        if self.steps <= self.delay_after:
            self.publish()

    def values(self) -> dict[str, Tensor]:
        self.publish()
        names = [name for name, _ in self.true.named_parameters()]
        found = {name: param.detach().clone() for name, param in self.shown.named_parameters()}
        for name, param in zip(names, self.true.parameters(), strict=True):
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}/{key}"] = value.clone()
        return found


def shown_by(run: Run) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in run.model.named_parameters()}


def of_run(run: Run) -> dict[str, Tensor]:
    return {name: value for name, value in run.values().items() if not name.startswith("master")}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_it_is_the_recurrence(optimizer: str, dtype: torch.dtype | None, tier: str, tmp_path: Path) -> None:
    run, reference = Run(optimizer, dtype, **delayed(tmp_path, tier)), Reference(optimizer, dtype, 2)
    for seed in range(6):
        run.loss(seed).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        reference.loss(seed).backward()
        reference.step()
        shown = {name: param.detach() for name, param in reference.shown.named_parameters()}
        assert_same(shown_by(run), shown)
        assert run.update.delay.pending == (seed >= 2)
    assert run.update.delay.delayed_steps == 4
    assert run.store is not None
    run.store.settle()
    assert not run.update.delay.pending
    assert_same(of_run(run), reference.values())


def test_it_is_not_the_plain_update(tmp_path: Path) -> None:
    plain, late = Run("adamw"), Run("adamw", **delayed(tmp_path))
    for seed in range(4):
        plain.step(seed)
        late.step(seed)
    one, two = plain.values(), late.values()
    assert not any(
        torch.equal(one[name], two[name]) for name in one if "weight" in name and "step" not in name
    )


def test_it_converges_as_far_as_the_plain_update(tmp_path: Path) -> None:
    """Bound: after 60 steps of a regression the delayed loss is at most 1.25 times the plain one."""
    losses = []
    for settings in ({}, delayed(tmp_path, delay_after=10)):
        run = Run("adamw", layers=2, **settings)
        run.optimizer.param_groups[0]["lr"] = 3e-3
        draw = torch.Generator().manual_seed(7)
        x = torch.randn(64, WIDTH, generator=draw)
        y = torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5)
        first = None
        for _ in range(60):
            loss = (run.model(x) - y).square().mean()
            first = first or loss.item()
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.owner.settle()
        losses.append((run.model(x) - y).square().mean().item())
        assert losses[-1] < first / 4
    assert losses[1] != losses[0]
    assert losses[1] < 1.25 * losses[0]


def test_clipping_and_a_schedule_are_those_of_the_gradient(tmp_path: Path) -> None:
    run, reference = Run("adamw", **delayed(tmp_path)), Reference("adamw", None, 2)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o.optimizer, 0.7) for o in (run, reference)]
    clipped = 0
    for seed in range(6):
        limit = 1e-2 if seed % 2 else 1e3
        run.loss(seed).backward()
        norm = clip_grad_norm_(run.optimizer, limit)
        run.optimizer.step()
        run.optimizer.zero_grad()
        reference.loss(seed).backward()
        factor = float((limit / (norm + 1e-6)).clamp(max=1.0))
        clipped += factor < 1.0
        reference.step(factor)
        for schedule in schedules:
            schedule.step()
    assert clipped == 3
    assert_same(of_run(run), reference.values())


def test_the_engine_accumulates_into_another_home(tmp_path: Path) -> None:
    run = Run("adamw", **delayed(tmp_path, "nvme"))
    engine = Engine(run.model, run.owner, run.sharded, max_norm=1e3, accumulate=2)
    reference = Reference("adamw", None, 2)
    for seed in range(10):
        engine.backward(run.loss(seed))
        engine.step()
        reference.loss(seed, 0.5).backward()
        if seed % 2:
            reference.step()
    assert_same(of_run(run), reference.values())


def parked_and_back(run: Run) -> None:
    park(run.optimizer)
    unpark(run.optimizer)


LOOKS: dict[str, Callable[[Run], object]] = {
    "the model's checkpoint": lambda run: run.owner.state_dict(),
    "the optimizer's checkpoint": lambda run: run.sharded.state_dict(),
    "parking": parked_and_back,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_publishes(look: Callable[[Run], object], tmp_path: Path) -> None:
    """A checkpoint sees every update, and so does what is parked; the step after it lacks none."""
    run, reference = Run("adamw", **delayed(tmp_path)), Reference("adamw", None, 2)
    for seed in range(7):
        run.loss(seed).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        reference.loss(seed).backward()
        reference.step()
        if seed == 4:
            look(run)
            assert not run.update.delay.pending
            reference.publish()
            assert_same(shown_by(run), {n: p.detach() for n, p in reference.shown.named_parameters()})
    assert_same(of_run(run), reference.values())


def test_a_skipped_step_publishes_nothing(tmp_path: Path) -> None:
    run, reference = Run("adamw", **delayed(tmp_path)), Reference("adamw", None, 2)
    for seed in range(6):
        run.loss(seed).backward()
        if seed == 4:
            before = shown_by(run)
            run.sharded.skip_step()
            assert_same(before, shown_by(run))
            continue
        run.optimizer.step()
        run.optimizer.zero_grad()
        reference.loss(seed).backward()
        reference.step()
    assert_same(of_run(run), reference.values())


def test_step_returns_while_the_update_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_offload.delayed import LateUpdate

    run, gate, update = Run("adamw", **delayed(tmp_path)), threading.Event(), LateUpdate.update
    for seed in range(2):
        run.step(seed)

    def wait(self: LateUpdate, now: Any) -> None:
        assert gate.wait(30)
        update(self, now)

    monkeypatch.setattr(LateUpdate, "update", wait)
    run.step(2)  # would never return if it waited
    run.loss(3).backward()  # nor this
    gate.set()
    run.optimizer.step()
    assert run.update.delay.delayed_steps == 2


def test_an_error_of_the_worker_comes_out_of_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_offload.delayed import LateUpdate

    for call in ("step", "settle"):
        run = Run("adamw", **delayed(tmp_path))
        for seed in range(2):
            run.step(seed)

        def fail(self: LateUpdate, now: Any) -> None:
            raise OSError("a lamp fell over")

        before = shown_by(run)
        with monkeypatch.context() as patch:
            patch.setattr(LateUpdate, "update", fail)
            run.step(2)
            with pytest.raises(OSError, match="a lamp fell over"):
                run.step(3) if call == "step" else run.owner.settle()
        assert_same(before, shown_by(run))


def test_it_takes_what_it_says(tmp_path: Path) -> None:
    """fp32: a second gradient, master and whole parameter's part: 12 bytes per parameter."""
    plain, late = Run("adamw", nvme=str(tmp_path)), Run("adamw", **delayed(tmp_path))
    for seed in range(5):
        plain.step(seed)
        late.step(seed)
    assert plain.store is not None
    assert late.store is not None
    numel = sum(p.numel() for p in late.model.parameters())
    more = late.store.bytes_by_tier()["host"] - plain.store.bytes_by_tier()["host"]
    assert more == 12 * numel
    late.store.close()
