"""Error feedback: the recurrence in plain torch, the mean that it converges to, steps, checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm import ErrorFeedback, Int4, Int8, LoCo, NotFiniteError, OneBit, TwoHop
from ds_core import CheckpointStore, ShardedOptimizer
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed, run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from routed import coded, gradient, in_order, own, two_hops


def reduce(owner: FlatOwner, step: int, rank: int | None = None, *, same: bool = False) -> Tensor:
    """One step's mean of the gradients [shard_numel], as the reducer asks for it."""
    unit, route = owner.trainable[0], owner.routes["reduce"]
    assert isinstance(route, ErrorFeedback | TwoHop)
    full = gradient(unit, dist.get_rank() if rank is None else rank, 0 if same else step)
    out = torch.empty(unit.layout.shard_numel)
    route.reduce(unit, out, full, scale=1 / owner.comm.world, accumulate=False).wait()
    unit.edition += 1  # what a step does
    return out


def errors_of(owner: FlatOwner) -> Tensor:
    route = owner.routes["reduce"]
    assert isinstance(route, ErrorFeedback)
    return route.errors.of(owner.trainable[0])


def one_hop(given: list[Tensor], codec: Any) -> tuple[Tensor, list[Tensor]]:
    rows = [coded(codec, part.view(len(given), -1)).view(-1) for part in given]
    return in_order(rows), [part - row for part, row in zip(given, rows, strict=True)]


def clean(owner: FlatOwner, flat: Tensor) -> Tensor:
    kept = torch.zeros_like(flat)
    for slot in owner.trainable[0].layout.slots:
        kept[slot.start : slot.end] = flat[slot.start : slot.end]
    return kept


class Oracle:
    """The same steps in plain torch, for all ranks at once."""

    def __init__(self, owner: FlatOwner, *, beta: float, reset: int | None, hops: Any) -> None:
        self.owner, self.beta, self.reset, self.hops = owner, beta, reset, hops
        self.world, self.step = dist.get_world_size(), 0
        self.errors = [torch.zeros(owner.trainable[0].layout.numel) for _ in range(self.world)]

    def reduce(self) -> Tensor:
        if self.reset and self.step and self.step % self.reset == 0:
            self.errors = [torch.zeros_like(error) for error in self.errors]
        unit = self.owner.trainable[0]
        given = [error + gradient(unit, r, self.step) for r, error in enumerate(self.errors)]
        total, lost = self.hops(given)
        if self.beta:
            new = [
                e.mul(self.beta).add(x, alpha=1 - self.beta) for e, x in zip(self.errors, lost, strict=True)
            ]
        else:
            new = lost
        self.errors = [clean(self.owner, error) for error in new]
        self.step += 1
        return total[unit.span] * (1 / self.world)


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("route", ["int4", "onebit", "two hops"])
@distributed(world_size=4)
def test_the_recurrence(beta: float, route: str, rank: int) -> None:
    through: Any = {
        "int4": Int4(symmetric=False),
        "onebit": OneBit(),
        "two hops": TwoHop(Int8(), Int4(), node_size=2),
    }[route]
    owner = own(1, reduce=ErrorFeedback(through, beta=beta, reset_steps=3))

    def hops(given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return two_hops(given, Int8(), Int4(), 2) if route == "two hops" else one_hop(given, through)

    oracle = Oracle(owner, beta=beta, reset=3, hops=hops)
    for step in range(5):
        assert torch.equal(reduce(owner, step), oracle.reduce()), step
        assert torch.equal(errors_of(owner), oracle.errors[rank]), step
        assert bool(errors_of(owner).any())


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("two", [False, True])
@distributed(world_size=4)
def test_the_mean_of_what_is_sent_converges(beta: float, two: bool, world: int) -> None:
    """See [Note: nothing is lost for good]: after T steps off by (sum of e_T) / (world * (1 - beta) * T).

    G the largest gradient, E the largest error. One hop loses at most half a step of int4, (G + E) / 14, and
    e is an average of losses, so E <= (G + E) / 14. Two hops lose that and half a step of the sum of two
    ranks' decoded values, (2 (G + E) (1 + 1/14)) / 14 more. fp32 adds 2^-21 of a block's largest to each.
    """

    def route() -> Any:
        return TwoHop(Int4(), Int4(), node_size=2) if two else Int4()

    plain = own(1, reduce=route() if two else TwoHop(Int4(), Int4(), node_size=1))
    fed = own(1, reduce=ErrorFeedback(route(), beta=beta))
    unit = fed.trainable[0]
    full = [gradient(unit, r) for r in range(world)]
    true = in_order(full)[unit.span].double() / world
    share = (1 / 14 + (2 * (1 + 1 / 14) / 14 if two else 0)) * (1 + 2**-10)
    largest = max(float(part.abs().max()) for part in full) * share / (1 - share)
    total, flat = torch.zeros_like(true), torch.zeros_like(true)
    for step in range(1, 101):
        total += reduce(fed, step, same=True)
        flat += reduce(plain, step, same=True)
        if step in (10, 30, 100):
            bound = largest / ((1 - beta) * step) + 1e-6
            assert float((total / step - true).abs().max()) <= bound, step
    stays = float((flat / 100 - true).abs().max())
    assert stays > 5 * float((total / 100 - true).abs().max())
    assert stays == pytest.approx(float((reduce(plain, 0, same=True) - true).abs().max()), rel=1e-3)


@distributed(world_size=2)
def test_steps_are_counted_not_calls(rank: int) -> None:
    owner = own(1, reduce=LoCo(Int4(), reset_steps=2))
    unit, route = owner.trainable[0], owner.routes["reduce"]
    assert isinstance(route, LoCo)
    out = torch.zeros(unit.layout.shard_numel)
    seen = []
    for step in range(5):
        for micro in range(3):
            error = errors_of(owner).clone()
            full = gradient(unit, rank, 10 * step + micro)
            ticket = route.reduce(unit, out, full.clone(), scale=0.5, accumulate=micro > 0)
            if micro == 0:
                ticket.wait()
                decoded = coded(Int4(), (error + full).view(2, -1)).view(-1)
                kept = error.mul(0.8).add(error + full - decoded, alpha=0.2)
                seen.append(torch.equal(errors_of(owner), clean(owner, kept)))
        route.state_dict()  # waits for those that nobody waited for
        unit.edition += 1
    assert seen == [True, True, False, True, False]  # steps 2 and 4 begin without an error
    assert set(route.state_dict()["steps"].values()) == {5}


@distributed(world_size=2)
def test_a_micro_batch_waits_for_the_one_before(rank: int) -> None:
    """Two reductions of a unit at once: the second is given the error of the first."""
    first, second = (own(1, reduce=LoCo(Int4())) for _ in range(2))
    outs = []
    for owner, at_once in ((first, True), (second, False)):
        unit, route = owner.trainable[0], owner.routes["reduce"]
        assert isinstance(route, LoCo)
        out, tickets = torch.zeros(unit.layout.shard_numel), []
        for micro in range(3):
            full = gradient(unit, rank, micro)
            tickets.append(route.reduce(unit, out, full, scale=0.5, accumulate=micro > 0))
            if not at_once:
                tickets[-1].wait()
        for ticket in tickets:
            ticket.wait()
        outs.append(out)
    assert torch.equal(*outs)
    assert torch.equal(errors_of(first), errors_of(second))


def train(owner: FlatOwner, optimizer: ShardedOptimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        loss = (owner.model(torch.randn(5, 11, generator=generator)) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def made(route: Any) -> tuple[FlatOwner, ShardedOptimizer]:
    owner = own(0, reduce=route)
    return owner, ShardedOptimizer(torch.optim.AdamW(owner.model.parameters(), lr=0.01), owner)


def by_name(kind: str) -> Any:
    chance = {"rounding": "stochastic", "seed": 9}
    return {
        "loco": lambda: LoCo(Int4(), reset_steps=4),
        "chance": lambda: LoCo(Int4(**chance)),  # type: ignore[arg-type]
        "two hops": lambda: LoCo(TwoHop(Int8(), Int4(**chance), node_size=2)),  # type: ignore[arg-type]
        "no memory": lambda: TwoHop(Int8(), Int4(**chance), node_size=2),  # type: ignore[arg-type]
    }[kind]()


@pytest.mark.parametrize(("kind", "world"), [("loco", 2), ("chance", 2), ("two hops", 4), ("no memory", 4)])
def test_a_checkpoint_midway_resumes_to_the_bit(tmp_path: Path, kind: str, world: int) -> None:
    run_ranks(resume, world, folder=tmp_path, kind=kind)


def resume(folder: Path, kind: str) -> None:
    owner, optimizer = made(by_name(kind))
    train(owner, optimizer, range(3))
    CheckpointStore(folder).save(3, {"model": owner, "optimizer": optimizer})
    onward = train(owner, optimizer, range(3, 7))
    again, other = made(by_name(kind))
    train(again, other, range(20, 22))  # what is loaded replaces what is there
    CheckpointStore(folder).load({"model": again, "optimizer": other}, 3)
    assert train(again, other, range(3, 7)) == onward
    for one, two in zip(owner.units, again.units, strict=True):
        assert torch.equal(one.values(), two.values())
    fresh, without = made(by_name(kind))
    CheckpointStore(folder).load({"model": fresh}, 3)
    assert train(fresh, without, range(3, 7)) != onward


@pytest.mark.parametrize(("before", "after", "node"), [(2, 4, 2), (4, 2, 1), (2, 1, 1)])
def test_another_world_goes_on_with_the_mean_error(
    tmp_path: Path, before: int, after: int, node: int
) -> None:
    rows = run_ranks(save, before, folder=tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run_ranks(go_on, after, folder=tmp_path, node=node)


def save(folder: Path) -> list[float]:
    owner = own(1, reduce=LoCo(Int4()))
    for step in range(3):
        reduce(owner, step)
    route = owner.routes["reduce"]
    CheckpointStore(folder).save(1, {"route": route})
    found = []
    for slot in owner.trainable[0].layout.slots:
        found += errors_of(owner)[slot.start : slot.end].tolist()
    return found


def go_on(folder: Path, node: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    through: Any = TwoHop(Int8(), Int4(), node_size=node) if node > 1 else Int4()
    owner = own(1, reduce=LoCo(through))
    CheckpointStore(folder).load({"route": owner.routes["reduce"]}, 1)
    rows = torch.tensor(json.loads((folder / "rows.json").read_text()))
    mean, unit = in_order(list(rows)) / len(rows), owner.trainable[0]
    error, at = torch.zeros(unit.layout.numel), 0
    for slot in unit.layout.slots:
        error[slot.start : slot.end] = mean[at : at + slot.numel]
        at += slot.numel
    assert bool(error.any())
    assert torch.equal(errors_of(owner), error)
    given = [error + gradient(unit, r, 3) for r in range(world)]
    if world == 1:
        total, lost = given[0], [torch.zeros_like(error)]
    else:
        total, lost = two_hops(given, Int8(), Int4(), 2) if node > 1 else one_hop(given, Int4())
    assert torch.equal(reduce(owner, 3), total[unit.span] * (1 / world))
    assert torch.equal(errors_of(owner), clean(owner, error.mul(0.8).add(lost[rank], alpha=1 - 0.8)))


@distributed(world_size=4)
def test_stage_zero_owes_what_its_means_lost(world: int) -> None:
    """The sums over ranks: what was sent, and what all ranks still owe, are what was given."""
    owner = own(0, reduce=ErrorFeedback(TwoHop(Int4(), Int4(), node_size=2)))
    unit, sent = owner.trainable[0], torch.zeros(owner.trainable[0].layout.numel)
    given = torch.zeros_like(sent)
    for step in range(4):
        sent += reduce(owner, step) * world
        given += in_order([gradient(unit, r, step) for r in range(world)])
    owed = errors_of(owner).clone()
    owner.comm.all_reduce(owed).wait()
    assert float((given - sent - owed).abs().max()) < 1e-4  # a few roundings of fp32, of values up to 20
    assert float(owed.abs().max()) > 0.1


@distributed(world_size=2)
def test_what_is_not_finite(rank: int) -> None:
    owner = own(1, reduce=LoCo(Int4()))
    unit, route = owner.trainable[0], owner.routes["reduce"]
    assert isinstance(route, LoCo)
    reduce(owner, 0)
    full, out = gradient(unit, rank), torch.empty(unit.layout.shard_numel)
    if rank == 1:
        full[unit.layout.slots[1].start] = torch.nan
    with pytest.raises(NotFiniteError, match=r"the gradient of 0\.bias \(rank 1\)"):
        route.reduce(unit, out, full, scale=0.5, accumulate=False).wait()
    lenient = own(1, reduce=LoCo(Int4(nonfinite="mark")))
    unit, route = lenient.trainable[0], lenient.routes["reduce"]
    assert isinstance(route, LoCo)
    reduce(lenient, 0)
    route.reduce(unit, out, full, scale=0.5, accumulate=False).wait()
    assert bool(out.isnan().any())
    assert bool(errors_of(lenient).isfinite().all())


@distributed(world_size=2)
def test_ranks_that_disagree_about_beta(rank: int) -> None:
    with pytest.raises(ValueError, match=r"beta is 0.0 on rank 0; 0.1 on rank 1"):
        own(1, reduce=ErrorFeedback(Int4(), beta=0.1 * rank))


@pytest.mark.parametrize(
    ("options", "said"), [({"beta": 1.0}, "beta=1.0"), ({"reset_steps": 0}, "reset_steps=0")]
)
def test_bad_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoCo(Int4(), **options)
