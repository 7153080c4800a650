"""CommLog against hand-computed numbers, with a clock that the test holds in its hand."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_comm import CommLog, bus_factor
from ds_comm.log import share_away
from ds_comm.log_pays import ENOUGH
from ds_comm.log_rows import num_bytes
from ds_core.ground.flight import Lane
from ds_core.ground.listener import Call, Coded
from ds_core.ground.mesh import Mesh, Topology, ranks_per_node
from ds_core.train.clock import Clock, HostClock

CPU = torch.device("cpu")


class HandClock(HostClock):
    """Shows what the test says."""

    now = 0.0

    def mark(self) -> float:
        return self.now


class Stream:
    """A device whose events pass when the test says so."""

    def __init__(self) -> None:
        self.now, self.reached = 0.0, 0.0
        self.asked: deque[float] = deque()

    def mark(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        assert self.passed(end), "read before it has passed: that would wait for the device"
        return end - begin

    def passed(self, mark: float) -> bool:
        self.asked.append(mark)
        return mark <= self.reached


class Work:
    """A work with a future, whose callback runs when the test ends it."""

    def __init__(self) -> None:
        self.then_called: list[Any] = []

    def get_future(self) -> Work:
        return self

    def then(self, callback: Any) -> None:
        self.then_called.append(callback)

    def end(self) -> None:
        for callback in self.then_called:
            callback(self)


def a_log(clock: Clock, **options: Any) -> tuple[Mesh, CommLog]:
    mesh = Topology().build()
    return mesh, CommLog(mesh, clocks=lambda device: clock, **options)


def call(
    lane: Lane, op: str, nbytes: int, sent: int, coded: Coded | None = None, device: torch.device = CPU
) -> Call:
    flight = lane.record(op, torch.empty(nbytes, dtype=torch.uint8))
    return Call(lane.name.partition("/")[0], lane, flight, device, nbytes, sent, coded)


def play(clock: HandClock, log: CommLog, made: Call, *, flies: float, waits: float) -> None:
    """A collective that arrives after `flies` seconds; of these somebody waits the last `waits`."""
    span = log.begin(made)
    assert span is not None
    span.issued([])
    clock.now += flies - waits
    span.waits()
    clock.now += waits
    span.arrived()


@pytest.mark.parametrize(
    ("op", "world", "factor"),
    [
        *(("all_reduce", 2, 1.0), ("all_reduce", 4, 1.5), ("all_reduce", 8, 1.75)),
        *(("all_gather", 4, 0.75), ("reduce_scatter", 4, 0.75), ("all_to_all", 4, 0.75)),
        *(("broadcast", 4, 1.0), ("broadcast", 1, 0.0), ("all_reduce", 1, 0.0)),
    ],
)
def test_bus_factors_go_by_the_group(op: str, world: int, factor: float) -> None:
    assert bus_factor(op, world) == factor


def test_an_unknown_op_is_an_error_and_no_exit() -> None:
    with pytest.raises(LookupError, match=r"no collective 'gather_v'; there are all_gather"):
        bus_factor("gather_v", 2)


def test_bytes_latency_and_bandwidth_of_a_group() -> None:
    """An all-reduce of 8 MB in 4 ms in a group of 4 (whatever the job's size): 2 GB/s, and 3 GB/s a link."""
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/reduce", (4, 5, 6, 7))
    for milliseconds in (3.0, 4.0, 5.0):
        made = call(lane, "all_reduce", 8_000_000, 12_000_000)
        play(clock, log, made, flies=milliseconds / 1e3, waits=1e-3)
    (row,) = log.summary().rows
    assert (row.axis, row.op, row.codec, row.world, row.calls, row.timed) == (
        *("dp_shard", "all_reduce", "", 4, 3),
        3,
    )
    assert (row.wire_bytes, row.logical_bytes, row.sent_bytes) == (24_000_000, 24_000_000, 36_000_000)
    assert (row.mean_ms, row.median_ms, row.max_ms) == pytest.approx((4.0, 4.0, 5.0))
    assert row.waited_ms == pytest.approx(3.0)
    assert row.algbw == pytest.approx(2e9)
    assert row.busbw == pytest.approx(3e9)
    log.close()


def test_an_arrival_nobody_waited_for_is_an_upper_bound_and_no_measurement() -> None:
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/gather", (0, 1))
    play(clock, log, call(lane, "all_gather", 1_000_000, 500_000), flies=0.5, waits=0.0)
    (row,) = log.summary().rows
    assert row.upper
    assert row.timed == 0
    assert row.mean_ms == pytest.approx(500)
    play(clock, log, call(lane, "all_gather", 1_000_000, 500_000), flies=0.001, waits=0.0005)
    (row,) = log.summary().rows
    assert (row.upper, row.timed, row.calls) == (False, 1, 2)
    assert row.algbw == pytest.approx(1e9)  # of the one that was seen
    log.close()


def test_coded_bytes_before_and_after_and_what_coding_took() -> None:
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/gather", (0, 1))
    with log.coding("dp_shard", "Int8Codec", "encode", CPU):
        clock.now += 0.002
    made = call(lane, "all_gather", 1_100_000, 550_000, Coded("Int8Codec", 4_000_000))
    play(clock, log, made, flies=0.003, waits=0.003)
    with log.coding("dp_shard", "Int8Codec", "decode", CPU):
        clock.now += 0.001
    summary = log.summary()
    assert [(r.codec, r.logical_bytes, r.wire_bytes) for r in summary.rows] == [
        ("Int8Codec", 4_000_000, 1_100_000)
    ]
    assert [(c.encode_ms, c.decode_ms) for c in summary.coding] == [(pytest.approx(2.0), pytest.approx(1.0))]
    log.close()


def test_a_cast_to_the_dtype_it_has_is_no_codec() -> None:
    clock = HandClock()
    _, log = a_log(clock)
    made = call(Lane("dp_shard/gather", (0, 1)), "all_gather", 1000, 500, Coded("CastCodec", 1000))
    play(clock, log, made, flies=0.003, waits=0.003)
    assert log.summary().rows[0].codec == ""
    log.close()


def slow_codec(clock: HandClock, log: CommLog, lane: Lane, wire_s: float) -> None:
    for _ in range(ENOUGH):
        with log.coding("dp_shard", "Int8Codec", "encode", CPU):
            clock.now += 0.004
        made = call(lane, "all_to_all", 2_000_000, 1_000_000, Coded("Int8Codec", 8_000_000))
        play(clock, log, made, flies=wire_s, waits=wire_s)
        log.end_step()


def test_compression_that_does_not_pay_is_said_once_with_both_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Plain 1 GB/s a link: 8 MB of two ranks take 4 ms. Coded they take 4 + 1 ms."""
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/reduce", (0, 1))
    with caplog.at_level(logging.WARNING, "ds_comm"):
        play(clock, log, call(lane, "all_gather", 4_000_000, 2_000_000), flies=0.002, waits=0.002)
        slow_codec(clock, log, lane, wire_s=0.001)
        slow_codec(clock, log, lane, wire_s=0.001)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "Int8Codec took 5.000 ms a call (4.000 of them encoding and decoding)" in said[0]
    assert "the same 8.00 MB plain would take 4.000 ms at the 1.000 GB/s" in said[0]
    assert "does not pay" in said[0]
    assert log.summary().findings == (said[0],)
    log.close()


def test_compression_that_pays_and_what_cannot_be_compared_are_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/reduce", (0, 1))
    with caplog.at_level(logging.WARNING, "ds_comm"):
        play(clock, log, call(lane, "all_gather", 4_000, 2_000), flies=0.002, waits=0.002)
        slow_codec(clock, log, lane, wire_s=0.001)
        assert log.summary().findings == ()  # a plain call that small says nothing about the wire
        play(clock, log, call(lane, "all_gather", 4_000_000, 2_000_000), flies=0.02, waits=0.02)
    assert caplog.records == []
    (finding,) = log.summary().findings
    assert finding.endswith("compression pays")
    log.close()


def test_a_bandwidth_measured_apart_counts() -> None:
    clock = HandClock()
    _, log = a_log(clock, plain_bandwidth={"dp_shard": 100e9})
    slow_codec(clock, log, Lane("dp_shard/reduce", (0, 1)), wire_s=0.001)
    assert "does not pay" in log.summary().findings[0]
    log.close()


def test_events_are_read_once_they_have_passed_and_never_waited_for() -> None:
    """On a device the arrival is what the work's future says, not when the stream that computes got there."""
    stream = Stream()
    _, log = a_log(stream)
    lane = Lane("dp_shard/gather", (0, 1))
    gpu = torch.device("cuda", 0)
    span = log.begin(call(lane, "all_gather", 1_000_000, 500_000, device=gpu))
    assert span is not None
    work = Work()
    span.issued([Work(), work])
    stream.now = 0.004
    work.end()
    stream.now = 0.010
    span.waits()
    span.arrived()
    assert log.summary().rows[0].timed == 0  # not passed yet: left for later
    stream.reached = 1.0
    (row,) = log.summary().rows
    assert row.timed == 1
    assert (row.mean_ms, row.waited_ms) == pytest.approx((4.0, 0.0))
    log.close()


def test_only_the_ops_and_axes_asked_for() -> None:
    clock = HandClock()
    _, log = a_log(clock, ops=("all_reduce",), axes=("dp_shard",))
    assert log.begin(call(Lane("dp_shard/reduce", (0, 1)), "all_gather", 8, 8)) is None
    assert log.begin(call(Lane("dp_replicate/reduce", (0, 1)), "all_reduce", 8, 8)) is None
    assert log.begin(call(Lane("dp_shard/reduce", (0, 1)), "all_reduce", 8, 8)) is not None
    assert [row.op for row in log.summary().rows] == ["all_reduce"]
    log.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ops": ("all_sum",)}, ValueError, "no 'all_sum'; allowed: all_gather"),
        ({"axes": ("rows",)}, LookupError, "no axis 'rows'"),
        ({"keep": 0}, ValueError, "keep=0: allowed is 1 or more"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    mesh = Topology().build()
    with pytest.raises(error, match=says):
        CommLog(mesh, **options)
    assert mesh.log.listener is None


def test_a_mesh_has_one_log_at_a_time() -> None:
    mesh = Topology().build()
    with CommLog(mesh) as first:
        with pytest.raises(RuntimeError, match="close it first"):
            CommLog(mesh)
        assert mesh.log.listener is first
    with CommLog(mesh):
        first.close()
        assert mesh.log.listener is not None


def test_bytes_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("DS_RANKS_PER_NODE", "2")
    assert share_away((0, 1, 2, 3), 0, 2) == pytest.approx(2 / 3)
    assert share_away((0, 2), 0, 2) == 1.0
    assert share_away((0, 1), 1, 2) == 0.0
    clock = HandClock()
    _, log = a_log(clock)
    play(clock, log, call(Lane("data/r", (0, 1, 2, 3)), "all_gather", 400, 300), flies=1.0, waits=1.0)
    assert log.summary().rows[0].cross_node_bytes == 200
    log.close()
    monkeypatch.setenv("DS_RANKS_PER_NODE", "half")
    with pytest.raises(ValueError, match="DS_RANKS_PER_NODE='half'"):
        ranks_per_node()
    monkeypatch.delenv("DS_RANKS_PER_NODE")
    assert ranks_per_node() is None


def test_steps_lines_table_and_picture(tmp_path: Path) -> None:
    clock = HandClock()
    _, log = a_log(clock)
    lane = Lane("dp_shard/reduce", (0, 1))
    log.end_step()  # nothing was sent: no step
    for number in (1, 2):
        for _ in range(number):
            play(clock, log, call(lane, "reduce_scatter", 1000, 500), flies=0.002, waits=0.001)
        log.end_step()
    steps = log.steps()
    assert [(row.step, row.calls, row.sent_bytes) for row in steps] == [(0, 1, 500), (1, 2, 1000)]
    assert [row.waited_ms for row in steps] == pytest.approx([1.0, 2.0])
    log.write(tmp_path / "log.jsonl", stragglers=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["row", "step", "step"]
    assert lines[0]["busbw"] == pytest.approx(250_000)
    text = str(log.summary())
    assert "reduce_scatter" in text
    assert "2 steps" in text
    pytest.importorskip("matplotlib")
    log.plot(tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="end in png, svg, pdf"):
        log.plot(tmp_path / "log.docx")
    log.close()


def test_each_collective_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    _, log = a_log(clock, verbose=True, debug=True)
    with caplog.at_level(logging.INFO, "ds_comm"):
        lane = Lane("dp_shard/gather", (0, 1))
        play(clock, log, call(lane, "all_gather", 4_000_000, 1, None), flies=0.004, waits=0.001)
    (record,) = caplog.records
    assert (
        "dp_shard of 2, all_gather: 4.00 MB, 4.000 ms, 1.000 waited, busbw 0.500 GB/s" in record.getMessage()
    )
    assert "test_log.py" in record.getMessage()  # debug: who called
    log.close()


def test_sizes_as_text() -> None:
    assert [num_bytes(n) for n in (12, 4_200_000, 3e12)] == ["12 B", "4.20 MB", "3000.00 GB"]
