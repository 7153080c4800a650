"""1-bit optimizers on real ranks at stages 0 to 2 against virtual workers in plain torch, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_comm import LambCoefficients, MomentumWire, OnebitAdam, OnebitLamb, ZeroOneAdam, ZeroOneSchedule
from ds_core import NonFiniteError, ReplicatedOwner, ShardedOptimizer, Topology
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES
from ds_core.testing.parity import assert_close_norm
from ds_kernels import FusedLamb
from ds_offload import TieredStore
from ds_zero import Zero, full_tensor, shard

sys.path.insert(0, str(Path(__file__).parent))

from onebit_oracle import AdamOracle, LambOracle, Oracle, ZeroOneOracle

BLOCK = 16
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def own(model: nn.Module, optimizer: Any, stage: int, dtype: str | None) -> FlatOwner:
    """The model in several small units."""
    if stage == 0:
        return ReplicatedOwner(model, dtype=dtype, bucket_numel=1, reduce=optimizer.route)
    settings = {"stage": stage, "dtype": dtype, "bucket_numel": 1, "cut": "flat"}
    if not optimizer.elementwise:
        settings["cut"] = "whole"
    return Zero.model_validate(settings).shard(model, reduce=optimizer.route)


def train(case: str, model: nn.Module, optimizer: Any, seeds: list[int]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in seeds:
        losses = CASES[case].losses(model, CASES[case].rank_batch(seed, rank, world))
        (torch.stack(losses).sum() / len(seeds)).backward()
    optimizer.step()
    optimizer.zero_grad()


def hold_equal(owner: FlatOwner, oracle: Oracle, sharded: ShardedOptimizer) -> None:
    """Masters, momentum, variance and both errors, to the bit."""
    for unit, wanted in zip(owner.trainable, oracle.units, strict=True):
        used = wanted.used[unit.span]
        assert torch.equal(unit.values()[used], wanted.values[unit.span][used]), unit.about
    for piece in sharded.pieces:
        wanted = oracle.units[owner.trainable.index(piece.unit)]
        at = unit_slice(piece)
        state = sharded.optimizer.state[piece.param]
        assert torch.equal(state["exp_avg"].view(-1), wanted.m[at]), piece.fqn
        assert torch.equal(state["exp_avg_sq"].view(-1), wanted.v[at]), piece.fqn
    route: Any = owner.routes["reduce"]
    saved = route.state_dict()
    rank = owner.comm.rank
    for wanted in oracle.units:
        for name, _, start, end in wanted.slots:
            if f"error/{name}" in saved:
                assert torch.equal(saved[f"error/{name}"].local, wanted.worker[rank][start:end]), name
                shard = saved.get(f"server/{name}")
                if shard is not None:
                    begin = start + shard.start
                    assert torch.equal(shard.local, wanted.server[begin : begin + shard.local.numel()]), name


def unit_slice(piece: Any) -> slice:
    low, high = piece.overlap.local
    start = piece.unit.span.start
    return slice(start + low, start + high)


def adam_equals(rank: int, world: int, case: str, stage: int, dtype: str | None, micro: int) -> int:
    model = CASES[case].build()
    optimizer = OnebitAdam(model.parameters(), freeze_step=2, wire=MomentumWire(block=BLOCK), **HYPER)
    owner = own(model, optimizer, stage, dtype)
    sharded = ShardedOptimizer(optimizer, owner)
    oracle = AdamOracle(CASES[case], owner.trainable, world=world, stage=stage, block=BLOCK, freeze_step=2)
    for step in range(6):
        seeds = [100 * step + number for number in range(micro)]
        train(case, model, optimizer, seeds)
        oracle.step(seeds)
        hold_equal(owner, oracle, sharded)
    assert optimizer.frozen
    return len(owner.trainable)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_onebit_adam_is_the_papers(stage: int, dtype: str | None, micro: int) -> None:
    units = run_ranks(adam_equals, 2, case="mlp", stage=stage, dtype=dtype, micro=micro)
    assert min(units) > 1


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (3, 0), (3, 2), (4, 1)])
def test_onebit_adam_at_other_worlds(world: int, stage: int) -> None:
    run_ranks(adam_equals, world, case="odd", stage=stage, dtype=None, micro=1)


def stage_three(world: int) -> None:
    model = CASES["mlp"].build()
    with pytest.raises(ValueError, match="use stage 0, 1 or 2"):
        shard(model, OnebitAdam(model.parameters(), freeze_step=2), stage=3)


def copies(world: int) -> None:
    model = CASES["mlp"].build()
    optimizer = OnebitAdam(model.parameters(), freeze_step=2)
    with pytest.raises(ValueError, match=r"2 groups hold copies \(dp_replicate > 1\)"):
        shard(model, optimizer, stage=1, mesh=Topology(dp_replicate=2, dp_shard=1).build())


def other_store(world: int) -> None:
    model = CASES["mlp"].build()
    optimizer = OnebitAdam(model.parameters(), freeze_step=2)
    with pytest.raises(ValueError, match="leave the store out"):
        shard(model, optimizer, stage=2, store=TieredStore(moments="host"))


@pytest.mark.parametrize("what", [stage_three, copies, other_store])
def test_what_cannot_be_served_is_refused(what: Any) -> None:
    run_ranks(what, 2)


def joined_by_shard(world: int, stage: int) -> None:
    model = CASES["mlp"].build()
    optimizer = OnebitAdam(model.parameters(), freeze_step=1)
    shard(model, optimizer, stage=stage)
    for step in range(3):
        train("mlp", model, optimizer, [step])
    assert optimizer.frozen
    assert optimizer.route.owner is not None


@pytest.mark.parametrize("stage", [0, 2])
def test_shard_joins_the_route_by_itself(stage: int) -> None:
    run_ranks(joined_by_shard, 2, stage=stage)


def odd_cases(world: int, stage: int) -> None:
    """Tied, frozen and unused parameters, and one that gets a gradient on one rank only."""
    for case in ("tied_blocks", "frozen", "unused_on_one_rank"):
        model = CASES[case].build()
        optimizer = OnebitAdam(
            [p for p in model.parameters() if p.requires_grad], freeze_step=2, wire=MomentumWire(block=BLOCK)
        )
        owner = own(model, optimizer, stage, None)
        ShardedOptimizer(optimizer, owner)
        before = {name: full_tensor(p).clone() for name, p in model.named_parameters()}
        for step in range(5):
            train(case, model, optimizer, [step])
        for name, param in model.named_parameters():
            whole = full_tensor(param)
            assert bool(torch.isfinite(whole).all()), (case, name)
            assert param.requires_grad or torch.equal(whole, before[name])
            theirs = [torch.empty_like(whole) for _ in range(world)]
            dist.all_gather(theirs, whole.contiguous())
            assert torch.equal(*theirs), (case, name)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_corners_of_models_train(stage: int) -> None:
    run_ranks(odd_cases, 2, stage=stage)


def zero_one_equals(
    rank: int, world: int, stage: int, dtype: str | None, micro: int, clipper: int
) -> list[str]:
    """Masters of every rank after every step, local ones too, to the bit."""
    case = "mlp"
    model = CASES[case].build()
    schedule = ZeroOneSchedule(7, var_update_scaler=2, local_step_scaler=3, local_step_clipper=clipper)
    optimizer = ZeroOneAdam(model.parameters(), schedule=schedule, wire=MomentumWire(block=BLOCK), **HYPER)
    owner = own(model, optimizer, stage, dtype)
    ShardedOptimizer(optimizer, owner)
    numbers = {"freeze": 7, "kappa": 2, "scaler": 3, "clipper": clipper}
    oracle = ZeroOneOracle(CASES[case], owner.trainable, world=world, stage=stage, block=BLOCK, **numbers)
    for step in range(20):
        seeds = [100 * step + number for number in range(micro)]
        train(case, model, optimizer, seeds)
        oracle.step(seeds)
        for unit, wanted, mine in zip(owner.trainable, oracle.units, oracle.x[rank], strict=True):
            used = wanted.used[unit.span]
            assert torch.equal(unit.values()[used], mine[unit.span][used]), (step, oracle.kinds, unit.about)
        assert optimizer.synced == (oracle.kinds[-1] != "local")
        if optimizer.synced and world > 1:
            for unit in owner.trainable if stage == 0 else ():
                theirs = [torch.empty_like(unit.values()) for _ in range(world)]
                dist.all_gather(theirs, unit.values().clone())
                assert all(torch.equal(theirs[0], each) for each in theirs)
    return oracle.kinds


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "micro", "clipper"),
    [
        (2, 0, None, 1, 4),
        (2, 0, "bfloat16", 3, 4),
        (3, 0, None, 1, 2),
        (2, 1, None, 3, 1),
        (3, 2, "bfloat16", 1, 1),
    ],
)
def test_zero_one_adam_is_the_papers(
    world: int, stage: int, dtype: str | None, micro: int, clipper: int
) -> None:
    kinds = run_ranks(zero_one_equals, world, stage=stage, dtype=dtype, micro=micro, clipper=clipper)[0]
    refreshes = [at + 1 for at, kind in enumerate(kinds) if kind == "plain"]
    assert refreshes == [1, 2, 3, 5, 7]
    assert kinds[5] == "signs"
    if clipper == 4:
        assert "".join(kind[0] for kind in kinds[7:]) == "sss" + "lslll" + "slll" + "s"


def local_steps_of_shards(world: int) -> None:
    model = CASES["mlp"].build()
    optimizer = ZeroOneAdam(model.parameters(), schedule=ZeroOneSchedule(4))
    with pytest.raises(ValueError, match="local_step_clipper=1"):
        shard(model, optimizer, stage=1)


def test_local_steps_of_shards_are_refused() -> None:
    run_ranks(local_steps_of_shards, 2)


def lamb_equals(rank: int, world: int, stage: int, dtype: str | None, micro: int) -> list[float]:
    case = "mlp"
    model = CASES[case].build()
    optimizer = OnebitLamb(model.parameters(), freeze_step=3, wire=MomentumWire(block=BLOCK), **HYPER)
    owner = own(model, optimizer, stage, dtype)
    sharded = ShardedOptimizer(optimizer, owner)
    oracle = LambOracle(CASES[case], owner.trainable, world=world, stage=stage, block=BLOCK, freeze_step=3)
    for step in range(9):
        seeds = [100 * step + number for number in range(micro)]
        train(case, model, optimizer, seeds)
        oracle.step(seeds)
        hold_equal(owner, oracle, sharded)
    for piece in sharded.pieces:
        state = optimizer.state[piece.param]
        assert torch.equal(state["factor"], oracle.last[piece.fqn])
        assert torch.equal(state["fresh_avg_sq"].view(-1), oracle.fresh[piece.fqn])
    return [float(factor) for factor in oracle.last.values()]


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "micro"),
    [(2, 0, None, 3), (3, 0, "bfloat16", 1), (2, 1, None, 1), (3, 2, None, 3), (2, 2, "bfloat16", 1)],
)
def test_onebit_lamb_is_the_papers(world: int, stage: int, dtype: str | None, micro: int) -> None:
    factors = run_ranks(lamb_equals, world, stage=stage, dtype=dtype, micro=micro)[0]
    assert len(set(factors)) > 1  # layers' rates follow, each its own variance
    assert 1.0 not in factors


def lamb_of_kernels(world: int) -> None:
    """The warm-up beside ds-kernels' LAMB, which sums norms in another order: within rounding."""
    found = []
    for kind in (OnebitLamb, FusedLamb):
        model = CASES["mlp"].build()
        more: dict[str, Any] = {"freeze_step": 9} if kind is OnebitLamb else {}
        optimizer: Any = kind(model.parameters(), eps=1e-6, **HYPER, **more)
        shard(model, optimizer, stage=1)
        for step in range(4):
            train("mlp", model, optimizer, [step])
        found.append({name: full_tensor(p).clone() for name, p in model.named_parameters()})
    assert_close_norm(found[0], found[1], 1e-5)


def test_the_warm_up_of_onebit_lamb_is_lamb() -> None:
    run_ranks(lamb_of_kernels, 2)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"min_coeff": 0.0}, "min_coeff must be above 0"),
        ({"factor_min": 5.0}, "factor_min must be above 0 and at most factor_max"),
        ({"coeff_beta": 1.0}, "coeff_beta"),
        ({"factor_threshold": 0.0}, "factor_threshold"),
    ],
)
def test_coefficients_that_mean_nothing_are_refused(settings: dict[str, float], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        LambCoefficients(**settings)


def spoilt_alone(rank: int, world: int) -> None:
    """In a local step only one rank knows; all raise before any weight moves."""
    model = CASES["mlp"].build()
    schedule = ZeroOneSchedule(1, local_step_scaler=1, local_step_clipper=64)
    optimizer = ZeroOneAdam(model.parameters(), lr=1e-5, schedule=schedule)
    shard(model, optimizer, stage=0)
    for step in range(4):
        train("mlp", model, optimizer, [step])
    assert not optimizer.synced
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = model.head.weight.register_hook(lambda g: g * float("inf") if rank == 1 else g)
    wanted = "this rank's gradient of head.weight" if rank == 1 else "another rank's gradient"
    with pytest.raises(NonFiniteError, match=wanted):
        train("mlp", model, optimizer, [4])
    handle.remove()
    optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    train("mlp", model, optimizer, [5])
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_local_step_with_what_is_not_finite_stops_everywhere() -> None:
    run_ranks(spoilt_alone, 2)
