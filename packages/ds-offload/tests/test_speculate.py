"""Speculation changes no bit of the training, whatever goes wrong with it, and does happen."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_core.train.clip import clip_grad_norm_
from ds_core.train.engine import Engine
from ds_core.train.scale import DynamicScale

sys.path.insert(0, str(Path(__file__).parent))

from overlap_cases import OPTIMIZERS, WIDTH, Run, assert_same

CHUNKS = 3 * 6  # of the model


def speculative(tmp_path: Path, tier: str = "host", **settings: Any) -> dict[str, Any]:
    tiers = {"masters": tier, "moments": tier, "grads": tier}
    return {"nvme": str(tmp_path), **tiers, "chunk_numel": 4096, "update": "speculative", **settings}


def pair(
    tmp_path: Path, optimizer: str = "adamw", dtype: torch.dtype | None = None, **more: Any
) -> list[Run]:
    """The same training without offload, and speculating."""
    return [Run(optimizer, dtype), Run(optimizer, dtype, **speculative(tmp_path, **more))]


def wait(run: Run) -> None:
    """Let the worker come to its end, as if the backward had taken long enough."""
    if run.store is not None and run.update.speculation._pool is not None:
        run.update.speculation._pool.submit(int).result()


def finish(run: Run) -> None:
    """The same after the last gradient has left."""
    run.owner.drain()
    wait(run)


def counts(run: Run) -> tuple[int, int, int]:
    found = run.update.speculation.counts
    return found.speculated, found.kept, found.rolled_back


@pytest.mark.parametrize("tier", ["host", "nvme", "0.5 host / 0.5 nvme"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_what_is_right_is_kept(optimizer: str, dtype: torch.dtype | None, tier: str, tmp_path: Path) -> None:
    one, two = pair(tmp_path, optimizer, dtype, tier=tier)
    for seed in range(3):
        for run in (one, two):
            run.loss(seed).backward()
            finish(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
        made = counts(two)[0]
        assert counts(two) == (made, made, 0)
        assert made == (0 if seed == 0 else CHUNKS)
    assert_same(one.values(), two.values())


def test_nothing_is_seen_before_the_step(tmp_path: Path) -> None:
    run = Run("adamw", **speculative(tmp_path))
    run.step(0)
    before = run.values()
    run.loss(1).backward()
    finish(run)
    assert sum(len(guess.done) for guess in run.update.speculation._guesses.values()) == CHUNKS
    now = {f"{p.fqn}/{n}": v for p in run.sharded.pieces for n, v in run.optimizer.state[p.param].items()}
    assert now
    assert all(torch.equal(before[name], value) for name, value in now.items())
    for piece in run.sharded.pieces:
        assert torch.equal(
            piece.param.view(-1), before[f"master {piece.unit.key}"][slice(*piece.overlap.local)]
        )
    run.optimizer.step()
    after = run.values()
    assert counts(run) == (CHUNKS, CHUNKS, 0)
    assert not any(torch.equal(before[name], after[name]) for name in now)


@pytest.mark.parametrize("fused", ["adamw", "fused"])
@pytest.mark.parametrize("wanted", ["never", "always", "in turn"])
def test_clipping_is_foreseen_as_none(wanted: str, fused: str, tmp_path: Path) -> None:
    one, two = pair(tmp_path, fused)
    clipped = 0
    for seed in range(6):
        small = {"never": False, "always": True, "in turn": bool(seed % 2)}[wanted]
        for run in (one, two):
            run.loss(seed).backward()
            finish(run)
            norm = clip_grad_norm_(run.optimizer, 1e-3 if small else 1e3)
            clipped += bool(norm > 1e-3) and small and run is two
            run.optimizer.step()
            run.optimizer.zero_grad()
        if seed:
            assert counts(two) == ((CHUNKS, 0, CHUNKS) if small else (CHUNKS, CHUNKS, 0))
    assert clipped == {"never": 0, "always": 6, "in turn": 3}[wanted]
    assert_same(one.values(), two.values())


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_the_engine_with_clipping_on(tier: str, tmp_path: Path) -> None:
    """Accumulation, a norm that is over the limit now and then, a schedule, an fp16 scale that overflows."""
    ends: list[dict[str, Tensor]] = []
    for settings in ({}, speculative(tmp_path, tier=tier)):
        run = Run("adamw", torch.float16, **settings)
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
        scaler = DynamicScale(2.0**24, window=4, hysteresis=1)
        engine = Engine(
            run.model, run.owner, run.sharded, max_norm=0.02, accumulate=2, scaler=scaler, scheduler=schedule
        )
        seen, kept = [], 0
        for seed in range(24):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine.backward(run.loss(seed, 8.0 if seed % 6 == 5 else 0.3))
                wait(run)
                report = engine.step()
            if report is None:
                continue
            seen.append((report.skipped, report.clip_coef < 1.0))
            if settings and report.step > 1:
                done, taken, thrown = counts(run)
                assert done + taken > 0 or report.skipped
                kept += taken
                assert thrown == done if report.skipped or report.clip_coef < 1.0 else thrown == 0
        assert {(True, True), (False, True), (False, False)} <= set(seen), seen
        assert kept > 0 or not settings
        ends.append(run.values())
    assert_same(*ends)


def test_a_wrong_guess_of_the_last_micro_batch(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    for seed, micro in enumerate([1, 1, 3, 1, 2, 2]):
        for run in (one, two):
            for number in range(micro):
                run.loss(10 * seed + number).backward()
                wait(run)
            finish(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
        done, kept, thrown = counts(two)
        if seed == 2:
            assert kept == 0
            assert thrown > 0  # it was taken for the last after one
        assert done == kept + thrown
    assert counts(two) == (CHUNKS, CHUNKS, 0)  # two micro batches, the second time
    assert_same(one.values(), two.values())


def twice(gradient: Tensor) -> Tensor:
    """In other memory, written as often as the gradient was."""
    found = gradient * 2
    while found._version < gradient._version:
        found.add_(0)
    return found


def touch(run: Run, what: str) -> None:
    """Something that comes between the backward and the step."""
    piece, group = run.sharded.pieces[2], run.optimizer.param_groups[0]
    unit, state = piece.unit, run.optimizer.state[piece.param]
    gradient = unit.gradient
    assert gradient is not None
    with torch.no_grad():
        {
            "lr": lambda: group.update(lr=group["lr"] * 0.5),
            "betas": lambda: group.update(betas=(0.8, 0.99)),
            "gradient": lambda: gradient.mul_(0.5),
            "another gradient": lambda: setattr(unit, "gradient", twice(gradient)),
            "master": lambda: unit.values().mul_(0.9),
            "shard": lambda: piece.param.mul_(0.9),
            "moment": lambda: state["exp_avg"].zero_(),
            "step": lambda: state["step"].add_(3),
            "state of its own": lambda: state.update(exp_avg=state["exp_avg"] * 2),
            "dropped one": lambda: unit.drop_grad_of(0),
            "saved": lambda: (run.owner.state_dict(), run.sharded.state_dict()),
            "dropped": run.optimizer.zero_grad,
        }[what]()
    if what == "dropped":
        run.loss(77).backward()


TOUCHES = {
    "lr": 0, "betas": 0, "gradient": CHUNKS - 3, "another gradient": CHUNKS - 3, "master": CHUNKS - 3,
    "shard": CHUNKS - 3, "moment": CHUNKS - 3, "step": CHUNKS - 3, "state of its own": CHUNKS - 3,
    "dropped one": CHUNKS - 3, "saved": None, "dropped": None,
}  # fmt: skip


@pytest.mark.parametrize("what", list(TOUCHES))
def test_what_changed_since_is_done_again(what: str, tmp_path: Path) -> None:
    """All of it where every unit is concerned, else the unit that was touched, of three chunks."""
    one, two = pair(tmp_path)
    for run in (one, two):
        run.step(0)
        run.loss(1).backward()
        finish(run)
        touch(run, what)
        run.optimizer.step()
        run.optimizer.zero_grad()
    if (kept := TOUCHES[what]) is not None:
        assert counts(two) == (CHUNKS, kept, CHUNKS - kept)
    for run in (one, two):
        run.step(2)
    assert_same(one.values(), two.values())


def test_gradients_that_are_dropped_leave_nothing(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    for run in (one, two):
        run.step(0)
    before = two.values()
    two.loss(5).backward()
    finish(two)
    two.sharded.skip_step()
    assert counts(two) == (CHUNKS, 0, CHUNKS)
    assert_same(before, two.values())
    for run in (one, two):
        run.step(1)
    assert_same(one.values(), two.values())


def test_a_backward_that_raises(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    for run in (one, two):
        run.step(0)
        first = run.model[0]
        assert isinstance(first, torch.nn.Linear)

        def fail(*_: Any) -> None:
            raise OSError("no power")

        handle = run.model[1].register_full_backward_hook(fail)
        with pytest.raises(OSError, match="no power"):
            run.loss(1).backward()
        handle.remove()
        run.optimizer.zero_grad()
        run.step(2)
    assert_same(one.values(), two.values())


def test_an_exception_of_the_worker_comes_out_of_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_offload.speculate import ApartUpdate

    one, two = pair(tmp_path)
    for run in (one, two):
        run.step(0)
    before = two.values()
    update, calls = ApartUpdate.update, []

    def fail(self: ApartUpdate, now: Any) -> None:
        calls.append(now)
        if len(calls) == 4:
            raise OSError("a lamp fell over")
        update(self, now)

    monkeypatch.setattr(ApartUpdate, "update", fail)
    two.loss(1).backward()
    finish(two)
    with pytest.raises(OSError, match="a lamp fell over"):
        two.optimizer.step()
    monkeypatch.undo()
    two.owner.settle()
    assert_same(before, two.values())
    two.optimizer.step()  # the gradients are still there
    two.optimizer.zero_grad()
    one.loss(1).backward()
    one.optimizer.step()
    one.optimizer.zero_grad()
    assert_same(one.values(), two.values())


def test_memory_is_bounded(tmp_path: Path) -> None:
    bytes_of_a_chunk = 4096 * 4 * 4
    one, two = pair(tmp_path, speculate_bytes=5 * bytes_of_a_chunk)
    for seed in range(3):
        for run in (one, two):
            run.loss(seed).backward()
            finish(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert two.update.speculation.nbytes <= 5 * bytes_of_a_chunk
    assert counts(two)[1] >= 5
    assert_same(one.values(), two.values())


def test_the_width_makes_three_chunks() -> None:
    assert -(-(WIDTH * WIDTH + WIDTH) // 4096) == 3
