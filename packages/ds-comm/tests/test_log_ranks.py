"""CommLog on real ranks: what it counts is what travelled, nothing changes, and the late rank is named."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_comm import CommLog, Int4, Int8, OnebitAdam, QuantizedWeights, TwoHop
from ds_core.ground.codec import CastCodec, gather_coded, reduce_coded
from ds_core.ground.flight import Lane
from ds_core.ground.mesh import Topology
from ds_core.ground.ticket import Ticket
from ds_core.state.owner import FlatOwner, ReplicatedOwner
from ds_core.state.precision import Precision
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.faults import slow_module
from ds_core.train.engine import Engine
from ds_core.train.optim import ShardedOptimizer


def build(codec: CastCodec | None = None, **degrees: int) -> tuple[nn.Module, Engine]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))
    owner = ReplicatedOwner(model, Topology(**degrees).build(), reduce=codec)
    optimizer = ShardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), owner)
    return model, Engine(model, owner, optimizer)


def train(model: nn.Module, engine: Engine, steps: int, late_ms: float = 0.0) -> list[dict[str, int]]:
    sent = []
    for step in range(steps):
        torch.manual_seed(1000 * step + dist.get_rank() if dist.is_initialized() else step)
        with slow_module(model[2], late_ms):
            loss = model(torch.randn(8, 16)).square().mean()
        engine.backward(loss)
        report = engine.step()
        assert report is not None
        sent.append(dict(report.bytes_on_wire))
    return sent


def after(steps: int, *, logged: bool) -> tuple[list[Tensor], list[dict[str, int]]]:
    model, engine = build()
    if not logged:
        sent = train(model, engine, steps)
    else:
        with CommLog(engine.owner.mesh) as log:
            sent = train(model, engine, steps)
        assert sum(row.sent_bytes for row in log.summary().rows) == sum(sum(s.values()) for s in sent)
        by_step: dict[int, int] = {}
        for row in log.steps():
            by_step[row.step] = by_step.get(row.step, 0) + row.sent_bytes
        assert list(by_step.values()) == [sum(one.values()) for one in sent if one]
        text = str(log.summary())
        assert not sent[0] or "all_reduce" in text
    return [param.detach().clone() for param in model.parameters()], sent


@pytest.mark.parametrize("world", [1, 2, 3])
def test_log_on_is_log_off_bit_for_bit(world: int) -> None:
    run_ranks(same_with_and_without, world)


def same_with_and_without(rank: int, world: int) -> None:
    plain, plain_sent = after(3, logged=False)
    logged, logged_sent = after(3, logged=True)
    assert plain_sent == logged_sent
    for one, other in zip(plain, logged, strict=True):
        assert torch.equal(one, other)


@distributed(4)
def test_two_axes_are_counted_by_their_own_groups(rank: int, world: int) -> None:
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    with CommLog(mesh) as log:
        data, shard = mesh.communicator("data"), mesh.communicator("dp_shard")
        data.all_reduce(torch.ones(3_000)).wait()
        shard.all_reduce(torch.ones(5_000)).wait()
        shard.all_gather(torch.empty(2_000), torch.ones(1_000)).wait()
    rows = {(row.axis, row.op): row for row in log.summary(stragglers=True).rows}
    assert {key: (row.world, row.wire_bytes, row.sent_bytes) for key, row in rows.items()} == {
        ("data", "all_reduce"): (4, 12_000, 2 * 12_000 * 3 // 4),
        ("dp_shard", "all_reduce"): (2, 20_000, 20_000),
        ("dp_shard", "all_gather"): (2, 8_000, 4_000),
    }
    for row in rows.values():
        factor = {"all_reduce": 2, "all_gather": 1}[row.op] * (row.world - 1) / row.world
        assert row.busbw == pytest.approx(row.algbw * factor)
        found = row.straggler
        assert found is not None
        assert len(found.late_ms) == row.world  # of its group, not of the job


@distributed(3)
def test_coded_collectives_say_what_their_bytes_stand_for(rank: int, world: int) -> None:
    mesh = Topology().build()
    comm, codec = mesh.communicator("dp_shard"), CastCodec(torch.bfloat16)
    full, shard = torch.randn(3 * 500), torch.randn(500)
    with CommLog(mesh) as log:
        gather_coded(comm, codec, full, shard).wait()
        reduce_coded(comm, codec, shard, full, scale=1.0, accumulate=False).wait()
        gather_coded(comm, None, full, shard).wait()
    rows = {(row.op, row.codec): row for row in log.summary().rows}
    assert {key: (row.logical_bytes, row.wire_bytes) for key, row in rows.items()} == {
        ("all_gather", "CastCodec"): (6_000, 3_000),
        ("reduce_scatter", "CastCodec"): (6_000, 3_000),
        ("all_gather", ""): (6_000, 6_000),
    }
    (coding,) = log.summary().coding
    assert coding.encode_ms > 0
    assert coding.decode_ms > 0


@distributed(2)
def test_an_owners_cast_counts_as_coding_though_its_buckets_are_cast_already(rank: int, world: int) -> None:
    model, engine = build(CastCodec(torch.bfloat16))
    with CommLog(engine.owner.mesh, axes=("dp_shard",), ops=("all_reduce",)) as log:
        train(model, engine, 1)
    rows = [row for row in log.summary().rows if row.codec]
    assert [row.codec for row in rows] == ["CastCodec"]
    assert rows[0].logical_bytes == 2 * rows[0].wire_bytes


@distributed(3)
def test_the_late_rank_is_named(rank: int, world: int) -> None:
    model, engine = build()
    with CommLog(engine.owner.mesh) as log:
        train(model, engine, 4, late_ms=40.0 if rank == 1 else 0.0)
    found = {row.op: row.straggler for row in log.summary(stragglers=True).rows}
    late = found["all_reduce"]
    assert late is not None
    assert late.rank == 1
    assert late.share > 0.5
    assert late.late_ms[1] > max(late.late_ms[0], late.late_ms[2]) + 5
    assert "1: " in str(log.summary(stragglers=True))
    with CommLog(engine.owner.mesh) as again:  # the exchange itself is not in it
        again.summary(stragglers=True)
        assert again.summary(stragglers=True).rows == ()


@distributed(2)
def test_plain_bandwidth_is_measured_along_an_axis(rank: int, world: int) -> None:
    mesh = Topology().build()
    log = CommLog(mesh)
    assert log.measure_plain("dp_shard", 1 << 16, times=3) > 0
    with pytest.raises(ValueError, match="'tp' has one rank"):
        log.measure_plain("tp")
    assert log.summary().rows == ()
    log.close()


class CountedWork:
    """A work that says how often it was waited for, and when."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


def test_the_log_waits_for_nothing_by_itself() -> None:
    """A ticket's work is waited for once, by whoever waits for the ticket, and not when it is issued."""
    mesh = Topology().build()
    with CommLog(mesh) as log:
        work = CountedWork()
        lane = Lane("dp_shard/reduce", (0, 1))
        options: Any = {"about": "", "elements": 4, "sent_bytes": 8}
        departure = mesh.log.depart("dp_shard", lane, "all_reduce", torch.ones(4), **options)
        ticket = Ticket([departure.start(lambda: [work])])
        log.end_step()
        log.summary()
        assert work.waits == 0
        ticket.wait()
        assert work.waits == 1


def test_a_collective_is_noted_in_microseconds() -> None:
    """The bound is ten times what it takes here; a step of 30 collectives stays below 1 % of 100 ms."""
    mesh = Topology().build()
    lane, tensor, works = Lane("dp_shard/reduce", (0, 1)), torch.ones(4), [CountedWork()]

    def collectives(count: int) -> float:
        begin = time.thread_time()
        for _ in range(count):
            mesh.log.depart("dp_shard", lane, "all_reduce", tensor, about="", elements=4, sent_bytes=8).start(
                lambda: works
            ).wait()
        return (time.thread_time() - begin) / count

    collectives(100)
    plain = min(collectives(500) for _ in range(5))
    with CommLog(mesh):
        logged = min(collectives(500) for _ in range(5))
    assert logged - plain < 300e-6
    print(f"{1e6 * (logged - plain):.1f} us a collective")


class Watcher(nn.Module):
    """A model of one unit for a 1-bit optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Cut(FlatOwner):
    stage = 1


@distributed(4)
def test_routes_of_two_hops_say_what_their_bytes_stand_for(rank: int, world: int) -> None:
    """qgZ and qwZ between two nodes of two ranks: every hop knows the bytes it would be without a codec."""
    torch.manual_seed(0)
    mesh = Topology().build()
    gather, reduce = QuantizedWeights(Int8(), node_size=2), TwoHop(Int8(), Int4(), node_size=2)
    owner = Cut(
        Watcher(),
        mesh,
        sharded=True,
        whole_grads=True,
        precision=Precision(),
        gather=gather,
        reduce=reduce,
    )
    (unit,) = owner.units
    numel = unit.layout.numel
    with CommLog(mesh) as log:
        full, out = torch.randn(numel), torch.empty(unit.layout.shard_numel)
        reduce.reduce(unit, out, full, scale=0.25, accumulate=False).wait()
        gather.gather(unit, torch.randn(unit.layout.shard_numel)).wait()
    rows = {(row.axis, row.op): row for row in log.summary().rows}
    assert {key: (row.codec, row.logical_bytes) for key, row in rows.items()} == {
        ("dp_shard/node", "all_to_all"): ("Int8", 4 * numel),
        ("dp_shard/across", "all_to_all"): ("Int4", 4 * numel // 2),
        ("dp_shard/across", "all_gather"): ("Int8", 4 * numel // 2),
        ("dp_shard/node", "all_gather"): ("Int8", 4 * numel),
    }
    assert all(row.wire_bytes < 0.3 * row.logical_bytes for row in rows.values())
    coding = {(row.axis, row.codec): row for row in log.summary().coding}
    assert {("dp_shard/node", "Int8"), ("dp_shard/across", "Int4")} <= set(coding)


@distributed(2)
def test_momenta_as_signs_say_what_their_bytes_stand_for(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = Watcher()
    optimizer = OnebitAdam(model.parameters(), lr=1e-3, freeze_step=1)
    mesh = Topology().build()
    owner = ReplicatedOwner(model, mesh, reduce=optimizer.route)
    engine = Engine(model, owner, ShardedOptimizer(optimizer, owner))
    with CommLog(mesh) as log:
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            engine.backward(model(torch.randn(8, 64)).square().mean())
            engine.step()
    signs = {row.op: row for row in log.summary().rows if row.codec == "SignRows"}
    assert set(signs) == {"all_to_all", "all_gather"}
    for row in signs.values():
        assert row.logical_bytes == row.calls * 4 * 64 * 64
        assert row.wire_bytes < row.logical_bytes / 25


@distributed(2)
def test_real_collectives_are_judged_against_a_plain_bandwidth(rank: int, world: int) -> None:
    """A wire of a terabyte a second needs no int8, one of ten kilobytes does; both numbers are real."""
    mesh = Topology().build()
    comm, full, out = mesh.communicator("dp_shard"), torch.randn(1 << 17), torch.empty(1 << 16)
    for bandwidth, end in ((1e12, "does not pay here, send plain"), (1e4, "compression pays")):
        with CommLog(mesh, plain_bandwidth={"dp_shard": bandwidth}) as log:
            for _ in range(12):
                reduce_coded(comm, Int8(), out, full, scale=0.5, accumulate=False).wait()
                log.end_step()
        (finding,) = log.summary().findings
        assert finding.startswith("dp_shard: Int8 took ")
        assert finding.endswith(end)
        plain_ms = 1e3 * full.nbytes / 2 / bandwidth
        assert f"the same 524.29 kB plain would take {plain_ms:.3f} ms" in finding
