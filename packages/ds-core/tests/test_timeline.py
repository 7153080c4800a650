"""Where a step's time goes: sums, waits that are planted, memory, plain loops, and nothing left behind."""

from __future__ import annotations

import json
import mmap
import time

import pytest
import torch
from torch import Tensor, nn

from ds_core import Engine, ReplicatedOwner, ShardedOptimizer, Timeline, initialize
from ds_core.observe.phases import Phases
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, Batch
from ds_core.train.clock import HostClock, StoppedClock, clock_for

CASE = CASES["mlp"]
NAP = 0.02


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return CASE.losses(model, batch)[0]


def build(accumulate: int = 1) -> Engine:
    model = CASE.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    owner = ReplicatedOwner(model, bucket_numel=64)
    return Engine(model, owner, ShardedOptimizer(optimizer, owner), accumulate=accumulate)


def hooks_of(model: nn.Module) -> list[list[int]]:
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.modules()]


def nap(*_: object) -> None:
    time.sleep(NAP)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parts_of_a_step_hold_what_was_planted_in_them(accumulate: int) -> None:
    engine = build(accumulate)
    engine.model.register_forward_pre_hook(nap)
    engine.model.get_parameter("head.weight").register_hook(lambda grad: nap())
    engine.optimizer.optimizer.register_step_pre_hook(nap)

    def slow_loss(model: nn.Module, batch: Batch) -> Tensor:
        nap()  # outside of the model
        return loss_fn(model, batch)

    with Timeline(engine) as timeline:
        for step in range(3):
            engine.train_batch([CASE.make_batch(step, 1)] * accumulate, slow_loss)
    assert len(timeline.steps) == 3
    for times in timeline.steps:
        naps = {"forward": accumulate, "backward": accumulate, "step": 1, "other": accumulate}
        for part, count in naps.items():
            assert getattr(times, part) >= count * NAP
        assert times.total == pytest.approx(times.forward + times.backward + times.step + times.other)
        assert times.total < 2 * sum(naps.values()) * NAP + 1.0  # no part counted the whole again
    mean = timeline.mean(skip=1)
    assert mean.total == pytest.approx(sum(s.total for s in timeline.steps[1:]) / 2)
    assert json.loads(json.dumps(mean.to_json()))["other"] == mean.other
    assert [line.split()[0] for line in timeline.table().splitlines()][:3] == ["forward", "backward", "step"]


@distributed(world_size=2)
def test_a_late_rank_shows_as_waiting_on_the_other(rank: int) -> None:
    engine = build()
    if rank == 1:
        engine.model.get_parameter("inp.weight").register_hook(lambda grad: nap())
    with Timeline(engine) as timeline:
        for step in range(3):
            engine.train_batch([CASE.rank_batch(step, rank, 2)], loss_fn)
    waited = sum(times.wait for times in timeline.steps)
    assert waited > 0
    if rank == 0:
        assert waited > 2 * NAP
    for times in timeline.steps:
        assert times.wait <= times.backward + times.step


def test_an_engine_from_a_deepspeed_file() -> None:
    file = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = initialize(model=nn.Linear(6, 2), config=file)
    with Timeline(engine) as timeline:
        for _ in range(2):
            engine.backward(engine(torch.randn(2, 6)).sum())
            engine.step()
    assert [min(t.forward, t.backward, t.step) > 0 for t in timeline.steps] == [True, True]


def test_a_plain_loop_is_seen_by_its_hooks() -> None:
    model = CASE.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(nap)
    model.get_parameter("inp.weight").register_hook(lambda grad: nap())
    batch = CASE.make_batch(0, 1)
    with Timeline(model, optimizer) as timeline:
        for _ in range(2):
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for times in timeline.steps:
        assert times.backward >= NAP
        assert times.step >= NAP
        assert 0 < times.forward < times.total
        assert times.wait == 0
    with pytest.raises(ValueError, match=r"Timeline\(model, optimizer\)"):
        Timeline(model)


def test_memory_is_seen_to_grow() -> None:
    engine = build()
    held: list[Tensor] = []

    def hoard(*_: object) -> None:
        held.append(torch.ones(128 << 20, dtype=torch.uint8))

    with Timeline(engine) as timeline:
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
        handle = engine.model.register_forward_hook(hoard)
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
        handle.remove()
    before, after = timeline.steps
    grown = after.live_bytes - before.live_bytes
    assert grown >= 120 << 20  # other memory may go back to the system meanwhile
    assert after.peak_bytes >= after.live_bytes


def test_the_peak_is_seen_between_forward_and_backward() -> None:
    engine, held = build(), []

    def borrow(*_: object) -> None:
        held.append(mmap.mmap(-1, 64 << 20))
        held[0].write(bytes(64 << 20))

    def give_back(grad: Tensor) -> None:
        held.pop().close()

    engine.model.register_forward_hook(borrow)
    engine.model.get_parameter("inp.weight").register_hook(give_back)
    with Timeline(engine) as timeline:
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    times = timeline.steps[0]
    assert times.peak_bytes - times.live_bytes >= 60 << 20


def test_nothing_is_left_in_any_order_of_leaving() -> None:
    engine = build()
    objects = [engine, engine.owner.comm, engine.owner.gather_comm, engine.owner.control]
    before = [dict(vars(thing)) for thing in objects]
    hooks = hooks_of(engine.model)
    one, other = Timeline(engine), Timeline(engine)
    one.__enter__()
    other.__enter__()
    engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    one.__exit__()
    engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    other.__exit__()
    engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    assert (len(one.steps), len(other.steps)) == (1, 2)
    assert hooks_of(engine.model) == hooks
    with Timeline(engine) as third:
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    assert len(third.steps) == 1
    for thing, was in zip(objects[1:], before[1:], strict=True):
        extra = set(vars(thing)) - set(was)
        assert all(getattr(vars(thing)[name], "__name__", "") == "watched" for name in extra)


def test_one_timeline_leaves_the_objects_as_they_were() -> None:
    engine = build()
    objects = [engine, engine.owner.comm, engine.owner.gather_comm, engine.owner.control]
    before, hooks = [set(vars(thing)) for thing in objects], hooks_of(engine.model)
    with Timeline(engine):
        engine.train_batch([CASE.make_batch(0, 1)], loss_fn)
    assert hooks_of(engine.model) == hooks
    assert [set(vars(thing)) for thing in objects] == before


class Recorder:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def begin(self, phase: str, of: str) -> str:
        self.said.append(f"+{phase} {of}".strip())
        return f"-{phase} {of}".strip()

    def end(self, begun: str) -> None:
        self.said.append(begun)

    def stepped(self) -> None:
        self.said.append("stepped")


def test_a_forward_that_raises_does_not_confuse_the_next() -> None:
    model = CASE.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder()
    phases = Phases(model, recorder, optimizer=optimizer)
    bad = model.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("x")))
    with pytest.raises(KeyError):
        model(torch.randn(2, 6))
    bad.remove()
    loss_fn(model, CASE.make_batch(0, 1)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    phases.detach()
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    once = ["+forward", "-forward", "+backward", "-backward", "+step", "-step", "stepped"]
    assert recorder.said == ["+forward", "-forward", *once]


def test_clocks() -> None:
    assert type(clock_for(torch.device("cpu"))) is HostClock
    assert type(clock_for(torch.device("meta"))) is StoppedClock
    clock = HostClock()
    begin = clock.mark()
    nap()
    assert clock.seconds(begin, clock.mark()) >= NAP
