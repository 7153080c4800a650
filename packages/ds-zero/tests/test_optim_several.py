"""Optimizers of the user's own, those that look at whole matrices, and several over one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core import CheckpointStore, DynamicScale, Engine, JointOptimizer
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_core.train.optim import ShardedOptimizer, attached, cut_for
from ds_zero import Zero, clip_grad_norm_, full_grad, full_optimizer_state, full_tensor, shard

CASE = CASES["mlp"]


class Lion(Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675), algorithm 2: the sign of an interpolated momentum."""

    elementwise = True

    def __init__(self, params: Any, lr: float = 1e-3, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = momentum.lerp(p.grad, 1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - second)


class Lamb(Optimizer):
    """You et al. 2019 (arXiv:1904.00962), algorithm 2: Adam's update, scaled by each matrix's own norms."""

    def __init__(self, params: Any, lr: float = 1e-2, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - first)
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                v.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                step = state.setdefault("step", torch.zeros(())).add_(1)
                update = (m / (1 - first**step)) / ((v / (1 - second**step)).sqrt() + 1e-6)
                update += group["weight_decay"] * p
                sizes = p.norm(), update.norm()
                trust = sizes[0] / sizes[1] if sizes[0] > 0 and sizes[1] > 0 else 1.0
                p.sub_(update * (group["lr"] * trust))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the blocks' matrices."""
    return [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]


def others(model: nn.Module) -> list[nn.Parameter]:
    chosen = {id(p) for p in matrices(model)}
    return [p for p in model.parameters() if id(p) not in chosen]


def muon(model: nn.Module) -> Optimizer:
    return torch.optim.Muon(matrices(model), lr=0.02)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(others(model), lr=1e-3)


def both(model: nn.Module) -> JointOptimizer:
    return JointOptimizer([muon(model), adamw(model)])


def backward(model: nn.Module, seed: int, share: float = 1.0) -> None:
    batch = CASE.rank_batch(seed, dist.get_rank(), dist.get_world_size())
    (CASE.losses(model, batch)[0] * share).backward()


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p, master=True) for name, p in model.named_parameters()}


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "lion": lambda model: Lion(model.parameters()),
    "lamb": lambda model: Lamb(model.parameters()),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "joint": lambda model: JointOptimizer(
        [Lamb(matrices(model)), torch.optim.SGD(others(model), lr=0.05, momentum=0.9)]
    ),
}


@distributed(world_size=2)
def test_optimizers_of_ones_own_equal_themselves_unsharded(rank: int) -> None:
    for name in MAKERS:
        against_itself(name)


def against_itself(name: str) -> None:
    """Lion's sign turns a gradient's last bit into a whole step, so its twin gets the very same gradients."""
    for stage in (0, 1, 2, 3):
        twin = Twin(CASE, MAKERS[name], ranks=2, zero_unused=False)
        model = CASE.build()
        model, optimizer = shard(model, MAKERS[name](model), stage=stage)
        for step in range(3):
            backward(model, step)
            if name == "lion":
                for fqn, p in twin.model.named_parameters():
                    p.grad = full_grad(model.get_parameter(fqn))
                twin.optimizer.step()
            else:
                twin.step([CASE.make_batch(step, 2)])
            optimizer.step()
            optimizer.zero_grad()
        assert_close_norm(masters(model), twin.parameters(), 0.0 if name == "lion" else 1e-5)


@distributed(world_size=3)
def test_muon_on_given_gradients_is_muon_to_the_bit(rank: int) -> None:
    """Newton-Schulz runs in bf16 and amplifies last bits, so the reference gets the very same gradients."""
    for stage in (0, 1, 2, 3):
        model, reference = CASE.build(), CASE.build()
        plain = both(reference)
        model, optimizer = shard(model, both(model), stage=stage)
        for step in range(3):
            backward(model, step)
            for fqn, p in reference.named_parameters():
                p.grad = full_grad(model.get_parameter(fqn))
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
            assert_close_norm(masters(model), {n: p.detach() for n, p in reference.named_parameters()}, 0.0)


@distributed(world_size=2)
def test_each_matrix_is_with_one_rank_and_no_rank_has_all(rank: int) -> None:
    for stage in (1, 3):
        count_copies(stage)


def count_copies(stage: int) -> None:
    model = CASE.build()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    chosen = {id(p) for p in matrices(model)}
    names = [n for n, p in model.named_parameters() if id(p) in chosen]
    model, optimizer = shard(model, both(model), stage=stage)
    backward(model, 0)
    optimizer.step()
    sharded = attached(optimizer)
    held = {
        piece.fqn: optimizer.state[piece.param]["momentum_buffer"]
        for piece in sharded.pieces
        if "momentum_buffer" in optimizer.state[piece.param]
    }
    copies = torch.tensor([float(name in held) for name in names])
    dist.all_reduce(copies)
    assert copies.tolist() == [1.0] * len(names)
    mine = sum(momentum.nbytes for momentum in held.values())
    total = torch.tensor([float(mine)])
    dist.all_reduce(total)
    assert float(total) == 4 * sum(sizes[name] for name in names)
    assert 0 < mine < float(total)
    assert {m.untyped_storage().nbytes() for m in held.values()} == {m.nbytes for m in held.values()}
    for name in names:
        momentum = full_optimizer_state(optimizer, model.get_parameter(name), "momentum_buffer")
        assert momentum is not None
        assert momentum.shape == model.get_parameter(name).shape


@distributed(world_size=2)
def test_only_the_units_of_optimizers_that_need_it_stay_whole(rank: int) -> None:
    """The head is AdamW's: whole on one rank it would double its buffer."""
    model = nn.Sequential(
        nn.ModuleList([nn.Linear(40, 40, bias=False) for _ in range(2)]), nn.Linear(40, 33_000)
    )
    split = JointOptimizer(
        [torch.optim.Muon(model[0].parameters()), torch.optim.AdamW(model[1].parameters())]
    )
    assert cut_for(split) == "whole"
    assert not split.elementwise
    names = frozenset(name for name, _ in model.named_parameters() if name.startswith("0."))
    owner = Zero(stage=3, cut=names, bucket_numel=1000).shard(model)
    ShardedOptimizer(split, owner)
    units = owner.units
    assert [unit.cut for unit in units] == ["whole", "whole", "flat"]
    assert units[2].layout.numel - units[2].layout.used_numel < 2 * 8
    owner = Zero(stage=1).shard(CASE.build())
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight is cut, but Muon"):
        ShardedOptimizer(muon(owner.model), owner)


def one_by_one(model: nn.Module, stage: int) -> tuple[Optimizer, Optimizer]:
    """Two optimizers on one owner, without joining them."""
    first = muon(model)
    second = adamw(model)
    if stage == 0:
        shard(model, first, stage=0)
    else:
        ShardedOptimizer(first, Zero(stage=stage, cut="whole").shard(model))
    ShardedOptimizer(second, attached(first).owner)
    return first, second


@distributed(world_size=2)
def test_two_optimizers_keep_their_hands_off_each_others_gradients(rank: int) -> None:
    for stage in (0, 1, 2, 3):
        alternate(stage, rank)


def alternate(stage: int, rank: int) -> None:
    """Every order of step and zero_grad that is legal in plain torch does what it does there."""
    joined = CASE.build()
    joined, joint = shard(joined, both(joined), stage=stage)
    model = CASE.build()
    first, second = one_by_one(model, stage)
    for step in range(4):
        backward(joined, step)
        norm = clip_grad_norm_(joint, 0.5)
        joint.step()
        joint.zero_grad()
        backward(model, step)
        assert torch.equal(clip_grad_norm_(second, 0.5), norm)  # of the whole model, once
        if step % 2:
            first.step()
            first.zero_grad()
            second.step()
            second.zero_grad()
        else:
            second.step()
            first.step()
            second.zero_grad()
            first.zero_grad()
        assert attached(first).owner.reducer.live() == []
        assert_close_norm(masters(model), masters(joined), 0.0)


@distributed(world_size=2)
def test_gradients_of_the_one_gather_while_the_other_steps(rank: int) -> None:
    for stage in (0, 1, 2, 3):
        step_at_different_times(stage, rank)


def step_at_different_times(stage: int, rank: int) -> None:
    """AdamW steps on every second backward: its gradient is the sum of two, at different weights."""
    reference = CASE.build()
    plain_muon = torch.optim.SGD(matrices(reference), lr=0.05)
    plain_rest = torch.optim.AdamW(others(reference), lr=1e-3)
    model = CASE.build()
    often, seldom = torch.optim.SGD(matrices(model), lr=0.05), adamw(model)
    shard(model, often, stage=stage)
    ShardedOptimizer(seldom, attached(often).owner)
    for step in range(4):
        backward(model, step)
        for part in range(2):
            (CASE.losses(reference, CASE.rank_batch(step, part, 2))[0] / 2).backward()
        for sharded, plain, turn in ((often, plain_muon, True), (seldom, plain_rest, step % 2 == 1)):
            if turn:
                for optimizer in (sharded, plain):
                    optimizer.step()
                    optimizer.zero_grad()
    assert_close_norm(masters(model), {n: p.detach() for n, p in reference.named_parameters()}, 1e-5)


@distributed(world_size=2)
def test_a_backward_that_raised_is_dropped_by_any_of_them(rank: int) -> None:
    stage = 3
    model, clean = CASE.build(), CASE.build()
    pair, reference = one_by_one(model, stage), one_by_one(clean, stage)
    lost = model.get_submodule("inp").register_full_backward_hook(fail)
    with pytest.raises(ArithmeticError):
        backward(model, 9)
    lost.remove()
    pair[0].zero_grad()
    for net, optimizers in ((model, pair), (clean, reference)):
        backward(net, 0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close_norm(masters(model), masters(clean), 0.0)


def fail(*_: Any) -> None:
    raise ArithmeticError("planted")


@distributed(world_size=2)
def test_an_engine_refuses_to_step_with_one_of_two(rank: int) -> None:
    model = CASE.build()
    first, _second = one_by_one(model, 3)
    with pytest.raises(ValueError, match=r"AdamW steps on inp\.weight.*JointOptimizer"):
        Engine(model, attached(first).owner, attached(first))


@distributed(world_size=2)
def test_joined_they_publish_once(rank: int) -> None:
    model = CASE.build()
    model, joint = shard(model, both(model), stage=1)
    apart = CASE.build()
    first, second = one_by_one(apart, 1)
    gathered = []
    for net, optimizers in ((model, [joint]), (apart, [first, second])):
        log = attached(optimizers[0]).owner.mesh.log
        backward(net, 0)
        log.clear()
        for optimizer in optimizers:
            optimizer.step()
        gathered.append(log.elements["dp_shard", "all_gather"])
    assert gathered[1] == 2 * gathered[0] > 0


def engine_of(stage: int, dtype: torch.dtype | None = None) -> Engine:
    model = CASE.build()
    model, optimizer = shard(model, both(model), stage=stage, dtype=dtype)
    sharded = attached(optimizer)
    scaler = DynamicScale(2.0**40) if dtype == torch.float16 else None
    return Engine(model, sharded.owner, sharded, max_norm=0.5, accumulate=2, scaler=scaler)


def engine_step(engine: Engine, seed: int, rank: int, world: int) -> Any:
    batches = [CASE.rank_batch(2 * seed + micro, rank, world) for micro in range(2)]
    return engine.train_batch(batches, lambda model, batch: CASE.losses(model, batch)[0])


@distributed(world_size=2)
def test_the_engine_takes_joined_optimizers_and_skips_both(rank: int, world: int) -> None:
    engine = engine_of(3, torch.float16)
    before = masters(engine.model)
    assert engine_step(engine, 0, rank, world).skipped
    assert_close_norm(masters(engine.model), before, 0.0)
    assert not engine.optimizer.optimizer.state


def save_two_steps(folder: str, rank: int, world: int) -> None:
    engine = engine_of(3)
    for seed in range(2):
        engine_step(engine, seed, rank, world)
    CheckpointStore(folder).save(1, engine.parts())
    engine_step(engine, 2, rank, world)
    CheckpointStore(folder).save(2, engine.parts())


def resume_one_step(folder: str, rank: int, world: int, stage: int) -> None:
    resumed, expected = engine_of(stage), engine_of(stage)
    store = CheckpointStore(folder)
    store.load(resumed.parts(), 1)
    store.load(expected.parts(), 2)
    engine_step(resumed, 2, rank, world)
    assert_close_norm(masters(resumed.model), masters(expected.model), 0.0)


def loaded(folder: str, stage: int) -> dict[str, list[float]]:
    engine = engine_of(stage)
    CheckpointStore(folder).load(engine.parts(), 1)
    found = {}
    for name, p in engine.model.named_parameters():
        for state in ("momentum_buffer", "exp_avg", "step"):
            value = full_optimizer_state(engine.optimizer, p, state)
            if value is not None:
                found[f"{name}/{state}"] = value.flatten().tolist()
    return found


def test_joined_optimizers_resume_where_they_were(tmp_path: Path) -> None:
    run_ranks(save_two_steps, 2, folder=str(tmp_path))
    states = run_ranks(loaded, 1, folder=str(tmp_path), stage=0)[0]
    assert sum(name.endswith("momentum_buffer") for name in states) == 6
    assert sum(name.endswith("exp_avg") for name in states) == 22 - 6
    assert run_ranks(loaded, 3, folder=str(tmp_path), stage=1) == [states] * 3
    for stage in (2, 3):  # which sum micro batches in the same order
        run_ranks(resume_one_step, 2, folder=str(tmp_path), stage=stage)


def test_a_joint_optimizer_is_an_optimizer() -> None:
    model, reference = CASE.build(), CASE.build()
    joint, plain = both(model), [muon(reference), adamw(reference)]
    schedule = torch.optim.lr_scheduler.StepLR(joint, step_size=1, gamma=0.5)
    plain_schedules = [torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5) for o in plain]
    for step in range(3):
        for net, optimizers, schedules in ((model, [joint], [schedule]), (reference, plain, plain_schedules)):
            CASE.losses(net, CASE.make_batch(step, 1))[0].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for each in schedules:
                each.step()
        if step == 1:
            joint.load_state_dict(joint.state_dict())
    assert_close_norm(dict(model.named_parameters()), dict(reference.named_parameters()), 0.0)
    with pytest.raises(ValueError, match="which of the joined"):
        joint.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        JointOptimizer([muon(model), muon(model)])
    assert JointOptimizer([adamw(model)]).elementwise
