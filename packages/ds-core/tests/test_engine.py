"""One step of the engine: accumulation, clipping, scaling, skipping, reporting, refusing."""

from __future__ import annotations

import re
import warnings

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
        assert report.clipped_norm == pytest.approx(min(0.3, expected.grad_norm), rel=1e-5)
        assert report.loss == pytest.approx(expected.loss, rel=1e-5)
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
    message = (
        r"step 2: gradients are not finite; rank 0's loss of backward 1 is not finite; first module: "
        r"blocks\.1\.up \(Linear\) on rank 0 turns finite inputs into .*; first gradient .*: head\.bias, "
    )
    with pytest.raises(NonFiniteError, match=message):  # the same words on both ranks
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


class _Overflows(torch.autograd.Function):
    """The identity, whose gradient is too large for fp16 whatever the loss scale."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))


def overflow_below(module: nn.Module) -> None:
    """From this module's output down, gradients overflow."""
    module.register_forward_hook(lambda m, a, out: _Overflows.apply(out))


@distributed(world_size=2)
def test_the_fifth_overflow_in_a_row_names_the_first_gradient(rank: int) -> None:
    engine = build("float16", scaler=DynamicScale(2.0**12, hysteresis=1))
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    if rank == 1:
        overflow_below(engine.model.get_submodule("blocks.1"))
    said = r"step 6: 5 overflows in a row, the loss scale is 128 now; the forward is finite on every rank.*; "
    said += r"first gradient in the backward's order: blocks\.1\.down\.bias, in rank 0's shard"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = [engine.train_batch([CASE.rank_batch(s, rank, 2)], loss_fn) for s in range(1, 6)]
    texts = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(texts) == (1 if rank == 0 else 0)
    assert all(re.match(said, text) for text in texts), texts
    assert [(r.skipped, r.clip_coef, r.clipped_norm) for r in reports] == [(True, 0.0, 0.0)] * 5


@distributed(world_size=2)
def test_an_overflow_at_the_smallest_scale_ends_with_the_names(rank: int) -> None:
    engine = build("float16", scaler=DynamicScale(2.0, hysteresis=1, minimum=2.0))
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    overflow_below(engine.model.get_submodule("blocks.0"))
    with pytest.raises(NonFiniteError, match=r"smallest loss scale, 2: .*: blocks\.0\.down\.bias, in rank"):
        engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    for name, param in engine.model.named_parameters():
        assert torch.equal(param, before[name])


def test_a_parameter_that_is_not_finite_is_named() -> None:
    engine = build()
    with torch.no_grad():
        engine.model.get_parameter("blocks.1.up.weight").fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.up \(Linear\) on rank 0 has a parameter .*weight"):
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)


@distributed(world_size=2)
def test_the_loss_and_the_norm_share_a_message(rank: int) -> None:
    """Nothing but what carries the gradients, their agreement, and one small message at stage 0."""
    engine = build()
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    calls: list[str] = []
    record = engine.owner.mesh.log.record
    engine.owner.mesh.log.record = lambda axis, op, *rest: (calls.append(op), record(axis, op, *rest))  # type: ignore
    engine.train_batch([CASE.rank_batch(1, rank, 2)], loss_fn)
    assert calls == ["all_reduce"] * (len(engine.owner.units) + 2)


@distributed(world_size=2)
def test_tokens_on_one_rank_only_are_refused_on_both(rank: int) -> None:
    engine = build()
    (loss,) = CASE.losses(engine.model, CASE.rank_batch(0, rank, 2))
    engine.backward(loss, tokens=4 if rank == 0 else None)
    with pytest.raises(RuntimeError, match="1 of this step's 2 micro batches over all ranks"):
        engine.step()
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)


def test_token_counts_that_make_no_sense_are_refused() -> None:
    engine = build(accumulate=2)
    batch = CASE.make_batch(0, 1)
    engine.backward(loss_fn(engine.model, batch), tokens=3)
    engine.step()
    with pytest.raises(ValueError, match="first backward of this step was given tokens"):
        engine.backward(loss_fn(engine.model, batch))
    engine.zero_grad()
    engine.backward(loss_fn(engine.model, batch))
    engine.step()
    with pytest.raises(ValueError, match="first backward of this step was given no tokens"):
        engine.backward(loss_fn(engine.model, batch), tokens=3)
    engine.zero_grad()
    with pytest.raises(ValueError, match="tokens must be 0 or more, got -1"):
        engine.backward(loss_fn(engine.model, batch), tokens=-1)
    single = build()
    single.backward(loss_fn(single.model, batch), tokens=0)
    with pytest.raises(ValueError, match="no token on any rank"):
        single.step()


def test_a_mean_over_no_token_counts_for_nothing() -> None:
    """Cross entropy over labels that are all ignored is NaN, with zero gradients."""
    engine, plain = build(), build()
    batch = CASE.make_batch(0, 1)
    engine.backward(loss_fn(engine.model, batch), tokens=torch.tensor(5))
    label = torch.full((len(batch["x"]),), -100)
    nothing = nn.functional.cross_entropy(engine(batch["x"]), label)
    assert nothing.isnan()
    engine.backward(nothing, tokens=0)
    report, expected = engine.step(), plain.train_batch([batch], loss_fn)
    assert report is not None
    assert (report.tokens, report.loss) == (5, expected.loss)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)


def test_losses_of_one_micro_batch_add_up() -> None:
    engine, twin = build(), build()
    batch = CASE.make_batch(0, 1)
    loss = loss_fn(engine.model, batch)
    engine.backward(loss, retain_graph=True)
    engine.backward(2 * loss)
    report = engine.step()
    expected = twin.train_batch([batch], lambda model, batch: 3 * loss_fn(model, batch))
    assert report is not None
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)


def test_a_loss_goes_backward_once() -> None:
    engine = build(accumulate=2)
    loss = loss_fn(engine.model, CASE.make_batch(0, 1))
    engine.backward(loss)
    engine.step()
    with pytest.raises(RuntimeError, match="went backward before"):
        engine.backward(loss)  # no forward since
    with pytest.raises(RuntimeError, match="without a backward"):
        engine.step()
    with pytest.raises(ValueError, match="this loss has no gradient"), torch.no_grad():
        engine.backward(loss_fn(engine.model, CASE.make_batch(0, 1)))
    engine.backward(loss_fn(engine.model, CASE.make_batch(1, 1)))
    assert engine.step() is not None  # none of it did harm


def test_an_optimizer_of_another_model_is_refused() -> None:
    one, other = build(), build()
    with pytest.raises(ValueError, match="steps on the parameters of another model"):
        Engine(one.model, one.owner, other.optimizer)
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        build(max_norm=0.0)


def test_explain_says_what_is_set_where_from_and_whether_it_acts() -> None:
    rows = {row.key: row for row in build(max_norm=0.5).explain()}
    assert (rows["engine.max_norm"].value, str(rows["engine.max_norm"].source)) == (0.5, "code")
    assert rows["engine.max_norm"].active
    assert str(rows["engine.accumulate"].source) == "default"
    assert not rows["engine.accumulate"].active
    assert rows["optimizer.groups.0.lr"].value == 0.1
    assert str(rows["optimizer.groups.0.momentum"].source) == "derived: the optimizer's defaults"
    text = str(build(max_norm=0.5).explain())
    assert re.search(r"^engine\.max_norm +0\.5 +code +yes +Engine\.step clips", text, re.MULTILINE)
