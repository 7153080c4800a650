"""What a step reports equals the unsharded twin at every stage, world size and accumulation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core import Engine, NonFiniteError, ReplicatedOwner, ShardedOptimizer, Topology
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.models import CASES, Batch
from ds_core.testing.parity import Twin, assert_close_norm
from ds_zero import Zero, full_tensor

CASE = CASES["mlp"]
MAX_NORM = 0.3
STEPS = 2
# fp32, the same sums in another order: the project's own rule for gradients and weights, and so for what is
# computed from them.
RTOL = 1e-5


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return CASE.losses(model, batch)[0]


def build(stage: int, mesh: object = None, **settings: object) -> Engine:
    model = CASE.build()
    optimizer = sgd(model)
    owner: FlatOwner
    if stage == 0:
        owner = ReplicatedOwner(model, mesh, bucket_numel=1)  # type: ignore[arg-type]
    else:
        owner = Zero(stage=stage, bucket_numel=1, keep_numel=0).shard(model, mesh)  # type: ignore[arg-type]
    return Engine(model, owner, ShardedOptimizer(optimizer, owner), **settings)  # type: ignore[arg-type]


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: full_tensor(p) for name, p in engine.model.named_parameters()}


def numbers_of_every_cell() -> None:
    rank, ranks, mesh = dist.get_rank(), dist.get_world_size(), Topology().build()
    for stage in (0, 1, 2, 3):
        for accumulate in (1, 2, 3):
            for check in (means_equal_the_twin, token_means_equal_one_large_batch):
                engine = build(stage, mesh, max_norm=MAX_NORM, accumulate=accumulate)
                try:
                    check(engine, rank, ranks)
                except AssertionError as fault:
                    cell = f"stage {stage}, accumulate {accumulate}"
                    raise AssertionError(f"{check.__name__}, {cell}: {fault}") from fault


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_number_equals_the_twin(world: int) -> None:
    run_ranks(numbers_of_every_cell, world)


def means_equal_the_twin(engine: Engine, rank: int, ranks: int) -> None:
    """Without tokens: the mean over micro batches and ranks."""
    twin = Twin(CASE, sgd, ranks=ranks, max_norm=MAX_NORM, zero_unused=False)
    for step in range(STEPS):
        seeds = [10 * step + micro for micro in range(engine.accumulate)]
        report = engine.train_batch([CASE.rank_batch(seed, rank, ranks) for seed in seeds], loss_fn)
        expected = twin.step([CASE.make_batch(seed, ranks) for seed in seeds])
        assert report.loss == pytest.approx(expected.loss, rel=RTOL)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=RTOL)
        assert report.clip_coef == pytest.approx(min(1.0, MAX_NORM / (expected.grad_norm + 1e-6)), rel=RTOL)
        assert report.clipped_norm == pytest.approx(min(MAX_NORM, expected.grad_norm), rel=RTOL)
        assert (report.skipped, report.tokens, report.loss_scale) == (False, None, 1.0)
        assert dict(report.bytes_on_wire) == bytes_by_formula(engine, ranks, first=step == 0)
    assert_close_norm(weights(engine), twin.parameters(), RTOL)


def bytes_by_formula(engine: Engine, ranks: int, *, first: bool) -> dict[str, int]:
    """Sent by one rank in a step, in fp32, every unit on its own and none kept for the backward.

    A reduce-scatter or an all-gather of N elements sends N * (W - 1) / W, an all-reduce twice that, but a
    small one, and a broadcast, N * (W - 1): every rank, or the first, sends to all others. With Psi elements
    in all: stage 0 reduces whole, 1 and 2 scatter (2: in every micro batch) and gather once, 3 scatters and
    gathers twice in every micro batch. On top: a vote for each parameter, each unit and the structure, four
    numbers of the signature, the norm and five sums in doubles, and in the first step rank 0's order.
    """
    if ranks == 1:
        return {}
    stage = engine.owner.stage
    units = engine.owner.units
    scattered = sum(4 * unit.layout.numel // ranks * (ranks - 1) for unit in units)
    gathered = sum(4 * unit.layout.shard_numel * (ranks - 1) for unit in units)
    whole = sum(all_reduced(4 * unit.layout.numel, ranks) for unit in units)
    micros = engine.accumulate
    model = [whole, scattered + gathered, micros * scattered + gathered, micros * (scattered + 2 * gathered)]
    votes = all_reduced(4 * (sum(len(unit.params) for unit in units) + len(units) + 5), ranks)
    sums = all_reduced(8 * (6 if stage else 5), ranks)
    order = 8 * len(units) * (ranks - 1) if first and engine.owner.comm.rank == 0 else 0
    return {"dp_shard": model[stage] + votes + sums + order}


def all_reduced(nbytes: int, ranks: int) -> int:
    """Bytes that one rank sends for an all-reduce."""
    return nbytes * (ranks - 1) if nbytes <= 4096 else 2 * nbytes * (ranks - 1) // ranks


def token_means_equal_one_large_batch(engine: Engine, rank: int, ranks: int) -> None:
    """Micro batches of 1 to 5 rows: every row counts the same, as if all were one batch of one process."""
    reference = CASE.build()
    plain = sgd(reference)
    for step in range(STEPS):
        parts = [[ragged(step, micro, other) for micro in range(engine.accumulate)] for other in range(ranks)]
        report = None
        for batch in parts[rank]:
            tokens: float | Tensor = len(batch["x"]) if step == 0 else torch.tensor(len(batch["x"]))
            engine.backward(loss_fn(engine.model, batch), tokens=tokens)
            report = engine.step()
        rows = [batch for mine in parts for batch in mine]
        together = {key: torch.cat([batch[key] for batch in rows]) for key in rows[0]}
        loss = loss_fn(reference, together)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM))
        plain.step()
        plain.zero_grad()
        assert report is not None
        assert report.tokens == len(together["x"])
        assert report.loss == pytest.approx(float(loss.detach()), rel=RTOL)
        assert report.grad_norm == pytest.approx(norm, rel=RTOL)
        assert report.clipped_norm == pytest.approx(min(MAX_NORM, norm), rel=RTOL)
    expected = {name: p.detach() for name, p in reference.named_parameters()}
    assert_close_norm(weights(engine), expected, RTOL)


def ragged(step: int, micro: int, rank: int) -> Batch:
    seed = 100 * step + 10 * micro + rank
    rows = 1 + seed * 7 % 5
    return {key: value[:rows] for key, value in CASE.make_batch(seed, 2).items()}


@distributed(world_size=2)
def test_the_sums_ride_on_the_norm(rank: int) -> None:
    """Where there are shards, reporting the loss of all ranks costs no message of its own."""
    engine = build(2)
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    engine.backward(loss_fn(engine.model, CASE.rank_batch(1, rank, 2)))
    engine.owner.drain()
    engine.owner.mesh.log.clear()
    engine.step()
    calls = engine.owner.mesh.log.calls
    assert not calls  # cleared with the report
    assert engine.report is not None
    sums = 2 * 8 * 6 // 2
    gathered = sum(4 * unit.layout.shard_numel for unit in engine.owner.units)
    assert engine.report.bytes_on_wire["dp_shard"] == sums + gathered


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_nan_is_named_where_parameters_are_cut(rank: int, stage: int) -> None:
    engine = build(stage)
    engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)
    before = weights(engine)
    handle = None
    if rank == 1:
        up = engine.model.get_submodule("blocks.1.up")
        handle = up.register_forward_hook(lambda m, a, out: out * float("nan"))
    said = r"rank 1's loss of backward 1 is not finite; first module: blocks\.1\.up \(Linear\) on rank 1 "
    with pytest.raises(NonFiniteError, match=said):
        engine.train_batch([CASE.rank_batch(1, rank, 2)], loss_fn)
    assert_close_norm(weights(engine), before, 0.0)
    if handle is not None:
        handle.remove()
    engine.train_batch([CASE.rank_batch(1, rank, 2)], loss_fn)


class _Overflows(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))


@pytest.mark.parametrize("name", ["head", "blocks.2", "blocks.0", "inp"])
@distributed(world_size=2)
def test_an_overflow_planted_in_a_layer_is_found_there(rank: int, name: str) -> None:
    engine = build(2)
    if rank == 1:
        engine.model.get_submodule(name).register_forward_hook(lambda m, a, out: _Overflows.apply(out))
    deepest = {"head": "head", "inp": "inp"}.get(name, f"{name}.down")
    with pytest.raises(NonFiniteError, match=rf"first gradient in the backward's order: {deepest}\.bias"):
        engine.train_batch([CASE.rank_batch(0, rank, 2)], loss_fn)


def test_explain_shows_what_a_stage_makes_idle() -> None:
    rows = {row.key: row for row in build(2).explain()}
    assert (rows["zero.stage"].value, str(rows["zero.stage"].source)) == (2, "code")
    assert not rows["zero.prefetch_numel"].active
    assert rows["zero.prefetch_numel"].acts.startswith("not at stage 2: ")
    assert str(rows["zero.cut"].source) == "default"
