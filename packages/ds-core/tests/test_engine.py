"""One step of the engine: accumulation, clipping, scaling, skipping, reporting, refusing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_core import DynamicScale, Engine, NonFiniteError, ReplicatedOwner, ShardedOptimizer, StaticScale
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, Batch
from ds_core.testing.parity import Twin, assert_close_norm

CASE = CASES["mlp"]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return CASE.losses(model, batch)[0]


def build(dtype: str | None = None, **settings: object) -> Engine:
    model = CASE.build()
    optimizer = sgd(model)
    owner = ReplicatedOwner(model, dtype=dtype)
    return Engine(model, owner, ShardedOptimizer(optimizer, owner), **settings)  # type: ignore[arg-type]


@distributed(world_size=2)
def test_reports_what_the_twin_did(rank: int) -> None:
    engine = build(max_norm=0.3, accumulate=2)
    twin = Twin(CASE, sgd, ranks=2, max_norm=0.3, zero_unused=False)
    for step in range(3):
        seeds = (10 * step, 10 * step + 1)
        report = engine.train_batch([CASE.rank_batch(seed, rank, 2) for seed in seeds], loss_fn)
        expected = twin.step([CASE.make_batch(seed, 2) for seed in seeds])
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert report.clip_coef == pytest.approx(min(1.0, 0.3 / (expected.grad_norm + 1e-6)), rel=1e-5)
        mean = torch.tensor(report.loss)
        torch.distributed.all_reduce(mean)
        assert float(mean) / 2 == pytest.approx(expected.loss, rel=1e-5)
        assert report.step == step + 1
        assert report.bytes_on_wire["dp_shard"] > 0
        assert not report.skipped
    assert_close_norm({n: p.detach() for n, p in engine.model.named_parameters()}, twin.parameters(), 1e-5)


@distributed(world_size=2)
def test_three_calls_equal_train_batch(rank: int) -> None:
    one, other = build(accumulate=2), build(accumulate=2)
    batches = [CASE.rank_batch(seed, rank, 2) for seed in range(2)]
    expected = one.train_batch(batches, loss_fn)
    reports = []
    for batch in batches:
        out = other(batch["x"])
        other.backward(torch.nn.functional.mse_loss(out, batch["y"]))
        reports.append(other.step())
    assert reports[0] is None
    assert reports[1] is not None
    assert reports[1].grad_norm == expected.grad_norm
    assert other.global_steps == 1


@distributed(world_size=2)
def test_overflow_on_one_rank_skips_the_step_on_all(rank: int) -> None:
    engine = build("float16", scaler=DynamicScale(2.0**4, hysteresis=1))
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    batch = dict(CASE.rank_batch(0, rank, 2))
    if rank == 1:
        batch["y"] = batch["y"] * 1e8
    report = engine.train_batch([batch], loss_fn)
    assert report.skipped
    assert report.loss_scale == 16.0
    assert engine.scaler is not None
    assert engine.scaler.value == 8.0
    for name, param in engine.model.named_parameters():
        assert torch.equal(param, before[name])
    report = engine.train_batch([CASE.rank_batch(1, rank, 2)], loss_fn)
    assert not report.skipped
    assert engine.skipped_steps == 1


@distributed(world_size=2)
def test_nan_names_the_step_and_the_first_module_before_any_weight_moves(rank: int) -> None:
    engine = build()
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    if rank == 0:
        engine.model.get_submodule("blocks.1.up").register_forward_hook(lambda m, a, out: out * float("nan"))
    message = r"step 2: .*blocks\.1\.up \(Linear\)" if rank == 0 else r"step 2: .*no module in the forward"
    with pytest.raises(NonFiniteError, match=message):
        engine.train_batch([CASE.rank_batch(1, rank, 2)], loss_fn)
    for name, param in engine.model.named_parameters():
        assert torch.equal(param, before[name])


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        build(accumulate=0)
    with pytest.raises(ValueError, match="pass scaler=DynamicScale"):
        build("float16")
    with pytest.raises(ValueError, match="for fp16 only"):
        build("bfloat16", scaler=StaticScale(2.0))
    with pytest.raises(ValueError, match="dtype must be one of"):
        build("int8")


def test_misuse_is_said() -> None:
    engine = build(accumulate=2)
    with pytest.raises(RuntimeError, match="without a backward"):
        engine.step()
    with pytest.raises(ValueError, match=r"one element, got shape \(3,\)"):
        engine.backward(torch.zeros(3, requires_grad=True))
    batch = CASE.make_batch(0, 1)
    with pytest.raises(ValueError, match="takes 2 micro batches, got 1"):
        engine.train_batch([batch], loss_fn)
    engine.zero_grad()
    with pytest.raises(ValueError, match="got more"):
        engine.train_batch([batch] * 3, loss_fn)


def test_scheduler_steps_once_per_applied_step() -> None:
    engine = build(accumulate=2)
    engine.scheduler = torch.optim.lr_scheduler.StepLR(engine.optimizer.optimizer, 1, gamma=0.5)
    batch = CASE.make_batch(0, 1)
    rates = [engine.train_batch([batch] * 2, loss_fn).lr for _ in range(3)]
    assert rates == pytest.approx([0.05, 0.025, 0.0125])
