"""Sums of the communication log: what each kind of collective came to, in all and in each step."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ds_comm.bandwidth import bus_factor
from ds_comm.log_rows import CommRow, StepRow

_KEPT = 4096  # latencies that a median is taken of


class Kind(NamedTuple):
    """What a row is about. `world`: of the group."""

    axis: str
    op: str
    codec: str
    world: int


@dataclass(slots=True)
class Times:
    """Latencies in seconds, with the wire bytes they are of; `sizes`: (bytes, seconds) by power of two."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0
    wire_bytes: int = 0
    sizes: dict[int, tuple[int, float]] = field(default_factory=dict)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, seconds: float, wire_bytes: int) -> None:
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self.wire_bytes += wire_bytes
        size = wire_bytes.bit_length()
        carried, spent = self.sizes.get(size, (0, 0.0))
        self.sizes[size] = carried + wire_bytes, spent + seconds
        self.last.append(seconds)


@dataclass(slots=True)
class Sum:
    """Everything of one kind. `exact`: of the calls whose arrival was seen, `any`: of all that arrived."""

    calls: int = 0
    logical_bytes: int = 0
    wire_bytes: int = 0
    sent_bytes: int = 0
    cross_node_bytes: float | None = None
    waited: float = 0.0
    smallest: int = 0  # wire bytes of the smallest call
    exact: Times = field(default_factory=Times)
    any: Times = field(default_factory=Times)

    def row(self, kind: Kind) -> CommRow:
        upper = self.exact.count == 0
        times = self.any if upper else self.exact
        return CommRow(
            axis=kind.axis,
            op=kind.op,
            codec=kind.codec,
            world=kind.world,
            calls=self.calls,
            timed=self.exact.count,
            upper=upper,
            logical_bytes=self.logical_bytes,
            wire_bytes=self.wire_bytes,
            sent_bytes=self.sent_bytes,
            cross_node_bytes=None if self.cross_node_bytes is None else round(self.cross_node_bytes),
            mean_ms=1e3 * times.total / max(1, times.count),
            median_ms=1e3 * statistics.median(times.last) if times.last else 0.0,
            max_ms=1e3 * times.longest,
            waited_ms=1e3 * self.waited,
            mean_timed_bytes=times.wire_bytes / max(1, times.count),
        )


@dataclass(slots=True)
class StepSum:
    """Traffic of one kind in one step."""

    calls: int = 0
    logical_bytes: int = 0
    wire_bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Tally:
    """All kinds, and a history of steps."""

    def __init__(self, keep_steps: int) -> None:
        self.sums: dict[Kind, Sum] = defaultdict(Sum)
        self.coding: dict[tuple[str, str], dict[str, float]] = defaultdict(
            lambda: {"encode": 0.0, "decode": 0.0}
        )
        self.step = 0
        self._now: dict[Kind, StepSum] = {}
        self._steps: deque[tuple[int, dict[Kind, StepSum]]] = deque(maxlen=keep_steps)

    def issue(self, kind: Kind, logical: int, wire: int, sent: int, cross: float | None) -> StepSum:
        """Count one call; gives the step that its time belongs to."""
        found = self.sums[kind]
        found.smallest = wire if found.calls == 0 else min(found.smallest, wire)
        found.calls += 1
        here = self._now.setdefault(kind, StepSum())
        for where in (found, here):
            where.logical_bytes += logical
            where.wire_bytes += wire
            where.sent_bytes += sent
        here.calls += 1
        if cross is not None:
            found.cross_node_bytes = (found.cross_node_bytes or 0.0) + cross
        return here

    def end_step(self) -> bool:
        """True if there was traffic, and therefore a step."""
        if not self._now:
            return False
        self._steps.append((self.step, self._now))
        self.step += 1
        self._now = {}
        return True

    def steps(self) -> list[StepRow]:
        """Of the steps that ended, the oldest first, and of the one under way."""
        ended = [*self._steps, *([(self.step, self._now)] if self._now else [])]
        return [
            StepRow(
                step=step,
                axis=kind.axis,
                op=kind.op,
                codec=kind.codec,
                calls=one.calls,
                logical_bytes=one.logical_bytes,
                wire_bytes=one.wire_bytes,
                sent_bytes=one.sent_bytes,
                ms=1e3 * one.seconds,
                waited_ms=1e3 * one.waited,
            )
            for step, kinds in ended
            for kind, one in sorted(kinds.items())
        ]

    def plain_bus_bandwidth(self, axis: str, at_least: int) -> float:
        """Bytes per second over a link of `axis`, of plain calls of `at_least` bytes, to a power of two; 0
        without any."""
        carried = seconds = 0.0
        for kind, one in self.sums.items():
            if kind.axis == axis and not kind.codec:
                for size, (num_bytes, spent) in one.exact.sizes.items():
                    if size >= at_least.bit_length():
                        carried += num_bytes * bus_factor(kind.op, kind.world)
                        seconds += spent
        return carried / seconds if seconds > 0 else 0.0
