"""What the communication log knows, as frozen rows: one for each axis, operation and codec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_comm.bandwidth import algorithm_bandwidth, bus_bandwidth
from ds_comm.stragglers import Straggler


@dataclass(frozen=True, slots=True)
class CommRow:
    """Collectives of one operation along one axis, with one codec ("" is none), on this rank.

    `logical_bytes`: of the whole tensors in their own dtype. `wire_bytes`: of the same as they travelled.
    `sent_bytes`: what this rank handed out of them; `cross_node_bytes`: to ranks of other hosts, as far as
    the group's ranks are spread evenly over its traffic, None where hosts are not known.

    Latency is from issue to arrival. On CPU an arrival is noticed when somebody waits: `timed` counts the
    calls that were waited for before they had arrived, which are exact, and the times and bandwidths are of
    those; where there are none (`upper`), of all, and then times are upper bounds. `waited_ms` is what the
    step lost: the time that this thread (or the device's stream) stood still for them.
    """

    axis: str
    op: str
    codec: str
    world: int
    calls: int
    timed: int
    upper: bool
    logical_bytes: int
    wire_bytes: int
    sent_bytes: int
    cross_node_bytes: int | None
    mean_ms: float
    median_ms: float
    max_ms: float
    waited_ms: float
    mean_timed_bytes: float
    straggler: Straggler | None = None

    @property
    def algbw(self) -> float:
        """Bytes of the collective's size on the wire per second."""
        return algorithm_bandwidth(self.mean_timed_bytes, self.mean_ms / 1e3)

    @property
    def busbw(self) -> float:
        """The same over each rank's link, by the size of the group."""
        return bus_bandwidth(self.op, self.world, self.mean_timed_bytes, self.mean_ms / 1e3)


@dataclass(frozen=True, slots=True)
class CodingRow:
    """What encoding and decoding for one axis took on this rank."""

    axis: str
    codec: str
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """Traffic of one axis, operation and codec in one step."""

    step: int
    axis: str
    op: str
    codec: str
    calls: int
    logical_bytes: int
    wire_bytes: int
    sent_bytes: int
    ms: float
    waited_ms: float


@dataclass(frozen=True, slots=True)
class CommSummary:
    """Everything so far; as text, a table. `findings`: sentences, such as that compression does not pay."""

    rank: int
    world: int
    steps: int
    rows: tuple[CommRow, ...]
    coding: tuple[CodingRow, ...]
    findings: tuple[str, ...]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield _table(self)
        yield from (f"{row.axis} {row.codec}: {_coding(row)}" for row in self.coding)
        yield from self.findings

    def lines(self) -> list[str]:
        """One JSON object each: rows, coding, findings."""
        return [
            *(_line("row", {**asdict(row), "algbw": row.algbw, "busbw": row.busbw}) for row in self.rows),
            *(_line("coding", asdict(row)) for row in self.coding),
            *(_line("finding", {"text": text}) for text in self.findings),
        ]


def step_lines(steps: Sequence[StepRow]) -> list[str]:
    """One JSON object for each row of each step."""
    return [_line("step", asdict(row)) for row in steps]


def _line(kind: str, fields: dict[str, Any]) -> str:
    return json.dumps({"kind": kind, **fields})


def _coding(row: CodingRow) -> str:
    return f"encode {row.encode_ms:.3f} ms, decode {row.decode_ms:.3f} ms in all"


def num_bytes(value: float) -> str:
    """Such as 4.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def _table(summary: CommSummary) -> Any:
    from rich import box
    from rich.table import Table

    told = any(row.straggler for row in summary.rows)
    crosses = any(row.cross_node_bytes for row in summary.rows)
    title = f"Communication of rank {summary.rank} of {summary.world}, {summary.steps} steps"
    table = Table(title=title, box=box.SIMPLE)
    for name in ("axis", "op", "codec"):
        table.add_column(name, no_wrap=True)
    numbers = ["ranks", "calls", "before", "on wire", "sent", *(["to other hosts"] if crosses else [])]
    numbers += ["mean ms", "median", "max", "waited ms", "algbw GB/s", "busbw GB/s"]
    for name in numbers:
        table.add_column(name, justify="right")
    if told:
        table.add_column("slowest rank", no_wrap=True)
    for row in summary.rows:
        most = "<" if row.upper else ""
        cells = [str(row.world), str(row.calls), num_bytes(row.logical_bytes), num_bytes(row.wire_bytes)]
        cells += [num_bytes(row.sent_bytes)]
        cells += [num_bytes(row.cross_node_bytes or 0)] if crosses else []
        cells += [f"{most}{row.mean_ms:.3f}", f"{most}{row.median_ms:.3f}", f"{most}{row.max_ms:.3f}"]
        cells += [f"{row.waited_ms:.3f}"]
        cells += [f"{'>' if row.upper else ''}{rate / 1e9:.3f}" for rate in (row.algbw, row.busbw)]
        table.add_row(row.axis, row.op, row.codec or "-", *cells, *([_late(row.straggler)] if told else []))
    return table


def _late(found: Straggler | None) -> str:
    if found is None or not found.lost_ms:
        return "-"
    late = found.late_ms[found.rank]
    return f"{found.rank}: {found.share:.0%} of the waiting, {late:.3f} ms late"
