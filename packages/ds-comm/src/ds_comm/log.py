"""The communication log: bytes, times, bandwidths and stragglers of every collective, waiting for none."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from ds_comm.bandwidth import OPS, bus_bandwidth
from ds_comm.log_pays import plan_verdicts
from ds_comm.log_plot import plot_steps
from ds_comm.log_rows import CodingRow, CommRow, CommSummary, StepRow, num_bytes, step_lines
from ds_comm.log_spans import CodingSpan, HostSpan, Pending, StreamSpan
from ds_comm.log_stamps import Stamps, wall_clock
from ds_comm.log_tally import Kind, StepSum, Tally
from ds_comm.stragglers import Straggler
from ds_core.ground.flight import Lane
from ds_core.ground.listener import Call, Part, Span
from ds_core.ground.mesh import Mesh, ranks_per_node
from ds_core.train.clock import Clock, clock_for

_log = logging.getLogger("ds_comm")
FSDP_AXIS = "fsdp"  # of what the bridge to FSDP2 sends, along groups that no mesh made


class CommLog:
    """Hears of every collective of a mesh from now on, until it is closed.

    ```python
    with CommLog(mesh) as log:
        train()
    print(log.summary(stragglers=True))
    ```

    Nothing waits for it: on CPU an arrival is noticed when its ticket is waited for anyway, elsewhere events
    are recorded and read later. A step is what lies between two `end_step()`; the engine says so by itself.
    `ops`, `axes`: only these; "dp_shard/across" is an axis too, and "fsdp" what `use_codecs` sends. `keep`:
    collectives whose times are kept to compare ranks, the same number on every rank. `verbose`: a line for
    each collective, with the caller if `debug`. `plain_bandwidth`: bytes per second over a link, by axis,
    where `measure_plain` or `ds comm bench` found it.
    Raises ValueError for an operation that does not exist, RuntimeError if the mesh has a log already.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        ops: Sequence[str] = OPS,
        axes: Sequence[str] | None = None,
        keep: int = 1024,
        verbose: bool = False,
        debug: bool = False,
        plain_bandwidth: Mapping[str, float] | None = None,
        clocks: Callable[[torch.device], Clock] = clock_for,
    ) -> None:
        unknown = [op for op in ops if op not in OPS]
        if unknown:
            raise ValueError(f"ops={list(ops)}: there is no {unknown[0]!r}; allowed: {', '.join(OPS)}")
        for axis in axes or ():
            if axis != FSDP_AXIS:
                mesh.size(axis.partition("/")[0])  # hops along an axis are called axis/node and axis/across
        if keep < 1:
            raise ValueError(f"keep={keep}: allowed is 1 or more")
        if mesh.log.listener is not None:
            raise RuntimeError("this mesh has a communication log already; close it first")
        self._mesh, self._ops, self._axes = mesh, frozenset(ops), None if axes is None else frozenset(axes)
        self._verbose, self._debug = verbose or debug, debug
        self._plain = dict(plain_bandwidth or {})
        self._tally = Tally(keep_steps=100_000)
        self._lock = threading.RLock()
        self._pending = Pending()
        self._clock = functools.cache(clocks)
        self._away: dict[Lane, float | None] = {}
        self._stamps = Stamps(keep, wall_clock())
        self._said: set[tuple[str, str]] = set()
        self.rank = mesh.rank("world")
        mesh.log.listener = self

    def close(self) -> None:
        """Hear no more. What was heard stays. Harmless when repeated."""
        if self._mesh.log.listener is self:
            self._mesh.log.listener = None

    def __enter__(self) -> CommLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what the communicators say ------------------------------------------------------------------------

    def begin(self, call: Call) -> Span | None:
        self._pending.read_some()
        if call.flight.op not in self._ops or (self._axes is not None and call.axis not in self._axes):
            return None
        logical, codec = _stands_for(call)
        with self._lock:
            kind = Kind(call.axis, call.flight.op, codec, len(call.lane.ranks))
            cross = self._sent_away(call)
            step = self._tally.issue(kind, logical, call.wire_bytes, call.sent_bytes, cross)
            arrived = self._stamps.issue(call)

        def ended(seconds: float, waited: float, seen: bool) -> None:
            arrived()
            self._end(kind, call, step, seconds, waited, seen)

        clock = self._clock(call.device)
        if call.device.type in ("cpu", "meta"):
            return HostSpan(clock, ended)
        return StreamSpan(clock, ended, self._pending)

    def coding(self, axis: str, codec: str, part: Part, device: torch.device) -> AbstractContextManager[None]:
        def told(seconds: float) -> None:
            with self._lock:
                self._tally.coding[axis, codec][part] += seconds

        return CodingSpan(self._clock(device), told, self._pending)

    def end_step(self) -> None:
        """What was heard so far belongs to the step that ends here; without any traffic there was none."""
        self._pending.read_some()
        with self._lock:
            if self._tally.end_step():
                self._warn()

    def _end(self, kind: Kind, call: Call, step: StepSum, seconds: float, waited: float, seen: bool) -> None:
        logical, _ = _stands_for(call)
        with self._lock:
            found = self._tally.sums[kind]
            found.waited += waited
            step.waited += waited
            step.seconds += seconds
            found.any.add(seconds, call.wire_bytes)
            if seen:
                found.exact.add(seconds, call.wire_bytes)
        if self._verbose:
            self._say(kind, call, logical, seconds, waited)

    def _say(self, kind: Kind, call: Call, logical: int, seconds: float, waited: float) -> None:
        coded = f" ({kind.codec} of {num_bytes(logical)})" if kind.codec else ""
        bus = bus_bandwidth(kind.op, kind.world, call.wire_bytes, seconds)
        where = f", from {call.flight.where}" if self._debug and call.flight.where else ""
        about = f" of {call.flight.about}" if call.flight.about else ""
        _log.info(
            "rank %d: %s of %d, %s%s: %s%s, %.3f ms, %.3f waited, busbw %.3f GB/s%s",
            *(self.rank, kind.axis, kind.world, kind.op, about, num_bytes(call.wire_bytes), coded),
            *(1e3 * seconds, 1e3 * waited, bus / 1e9, where),
        )

    def _sent_away(self, call: Call) -> float | None:
        if call.lane not in self._away:
            said = ranks_per_node()
            self._away[call.lane] = share_away(call.lane.ranks, self.rank, said[1] if said else None)
        share = self._away[call.lane]
        return None if share is None else call.sent_bytes * share

    # -- asking --------------------------------------------------------------------------------------------

    def summary(self, *, stragglers: bool = False) -> CommSummary:
        """Everything so far.

        Collective over all ranks of the job with `stragglers`: one all-gather of `keep` times each.
        """
        self._pending.read_all()
        with self._deaf():
            late = self._stamps.compare(self._mesh) if stragglers else {}
        with self._lock:
            rows = tuple(self._row(kind, late) for kind in sorted(self._tally.sums))
            coding = tuple(
                CodingRow(axis, codec, 1e3 * spent["encode"], 1e3 * spent["decode"])
                for (axis, codec), spent in sorted(self._tally.coding.items())
            )
            verdicts = plan_verdicts(self._tally, self._plain)
            self._warn()
            findings = tuple(str(verdict) for verdict in verdicts)
            return CommSummary(self.rank, self._mesh.world, self._tally.step, rows, coding, findings)

    def steps(self) -> list[StepRow]:
        """Traffic of each step, the oldest first."""
        self._pending.read_all()
        with self._lock:
            return self._tally.steps()

    def write(self, path: str | os.PathLike[str], *, stragglers: bool = False) -> None:
        """JSON lines: the rows of `summary`, then those of each step; a file that is there is replaced.

        Collective with `stragglers`.
        """
        lines = [*self.summary(stragglers=stragglers).lines(), *step_lines(self.steps())]
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Bytes and time of each axis and operation over the steps, as an image (needs ds-comm[plot])."""
        plot_steps(self.steps(), Path(path))

    def measure_plain(self, axis: str, num_bytes: int = 1 << 22, *, times: int = 5) -> float:
        """Bytes per second over a link of `axis` for plain all-gathers, the median of `times`; remembered.

        Collective, and it waits: call it before training. Raises ValueError on an axis of one rank.
        """
        from ds_comm.bench import time_plain

        if self._mesh.size(axis) == 1:
            raise ValueError(f"axis {axis!r} has one rank: nothing travels along it")
        with self._deaf():
            seconds = time_plain(self._mesh, axis, num_bytes, times)
        self._plain[axis] = bus_bandwidth("all_gather", self._mesh.size(axis), num_bytes, seconds)
        return self._plain[axis]

    def _row(self, kind: Kind, late: Mapping[tuple[str, str], Straggler]) -> CommRow:
        row = self._tally.sums[kind].row(kind)
        found = late.get((kind.axis, kind.op))
        return row if found is None else dataclasses.replace(row, straggler=found)

    @contextmanager
    def _deaf(self) -> Iterator[None]:
        """The log's own traffic is no part of what it tells."""
        before, self._mesh.log.listener = self._mesh.log.listener, None
        try:
            yield
        finally:
            self._mesh.log.listener = before

    def _warn(self) -> None:
        """Say once of each axis and codec that it costs more than it saves."""
        for verdict in plan_verdicts(self._tally, self._plain):
            key = verdict.axis, verdict.codec
            if not verdict.pays and key not in self._said:
                self._said.add(key)
                if self.rank == 0:
                    _log.warning("%s", verdict)


def _stands_for(call: Call) -> tuple[int, str]:
    """(Logical bytes, codec): a cast to the dtype that the tensor has anyway is none."""
    if call.coded is None or call.coded.logical_bytes == call.wire_bytes:
        return call.wire_bytes, ""
    return call.coded.logical_bytes, call.coded.codec


def share_away(ranks: Sequence[int], me: int, per_node: int | None) -> float | None:
    """The part of a group's other ranks that is on other hosts than `me`; None where hosts are not known."""
    if per_node is None:
        return None
    others = [rank for rank in ranks if rank != me]
    return sum(rank // per_node != me // per_node for rank in others) / max(1, len(others))
