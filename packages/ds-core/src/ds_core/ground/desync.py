"""When ranks stop agreeing: who waits for what, who never came, and one message for all of them (pure)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ds_core.ground.flight import Lane

_SHOWN_RANKS = 16
_TOLD = 64  # collectives of each lane that ranks tell each other


class DesyncError(RuntimeError):
    """Ranks no longer issue the same collectives, or one is gone. The message is the same on every rank."""


@dataclass(frozen=True, slots=True)
class Issued:
    """One collective in a report."""

    number: int
    what: str
    digest: int
    where: str


@dataclass(frozen=True, slots=True)
class LaneReport:
    """One rank's place in one lane; `waiting` is the number that it waits for, 0 if for none."""

    number: int
    waiting: int
    ranks: tuple[int, ...]
    recent: tuple[Issued, ...]

    def issued(self, number: int) -> Issued | None:
        return next((each for each in self.recent if each.number == number), None)


@dataclass(frozen=True, slots=True)
class Report:
    """Where one rank is. `where`: its main thread's user line; `left`: how it ended, if it has."""

    where: str
    left: str = ""
    lanes: Mapping[str, LaneReport] = field(default_factory=dict)

    @property
    def waits(self) -> tuple[str, LaneReport] | None:
        """The lane that this rank waits in."""
        return next(((name, lane) for name, lane in self.lanes.items() if lane.waiting), None)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Report:
        raw = json.loads(text)
        lanes = {
            name: LaneReport(
                lane["number"],
                lane["waiting"],
                tuple(lane["ranks"]),
                tuple(Issued(**each) for each in lane["recent"]),
            )
            for name, lane in raw["lanes"].items()
        }
        return cls(raw["where"], raw["left"], lanes)


def report_of(lanes: Iterable[Lane], where: str, left: str = "") -> Report:
    """This rank's own report."""
    found = {}
    for lane in lanes:
        waiting = lane.waiting
        issued = tuple(Issued(f.number, str(f), f.digest, f.where) for f in lane.recent(_TOLD))
        found[lane.name] = LaneReport(lane.number, waiting.number if waiting else 0, lane.ranks, issued)
    return Report(where, left, found)


def cannot_go_on(me: int, reports: Mapping[int, Report]) -> bool:
    """Is it certain that what rank `me` waits for will never happen? Slow ranks are not certain.

    It is when a rank of the group has left, has issued something else in that place, or itself waits for
    a collective that `me` has not come to.
    """
    mine = reports.get(me)
    if mine is None or mine.waits is None:
        return False
    name, lane = mine.waits
    wanted = lane.issued(lane.waiting)
    for rank, other in reports.items():
        if rank == me or rank not in lane.ranks:
            continue
        theirs = other.lanes.get(name)
        if other.left and (theirs is None or theirs.number < lane.waiting):
            return True
        same = theirs.issued(lane.waiting) if theirs is not None else None
        if same is not None and wanted is not None and same.what != wanted.what:
            return True
        if other.waits is None or (theirs is not None and theirs.number >= lane.waiting):
            continue
        their_name, their_lane = other.waits
        here = mine.lanes.get(their_name)
        if me in their_lane.ranks and here is not None and here.number < their_lane.waiting:
            return True
    return False


def first_difference(reports: Mapping[int, Report]) -> str:
    """Where ranks parted: the earliest collective that they issued differently, or from different lines.

    Of the lanes, one in which the collectives themselves differ comes first. Empty if unknown.
    """
    found = []
    for name in sorted({name for report in reports.values() for name in report.lanes}):
        by_number: dict[int, dict[int, Issued]] = {}
        for rank, report in reports.items():
            for each in report.lanes[name].recent if name in report.lanes else ():
                by_number.setdefault(each.number, {})[rank] = each
        differ = [n for n, by in by_number.items() if len({(e.what, e.where) for e in by.values()}) > 1]
        if differ:
            truly = any(len({e.what for e in by.values()}) > 1 for by in by_number.values())
            found.append((not truly, name, min(differ), by_number[min(differ)]))
    if not found:
        return ""
    _, name, number, issued = min(found, key=lambda each: each[:3])
    lines = {rank: f"{each.what}, called at {each.where or '?'}" for rank, each in issued.items()}
    return f"ranks parted at collective {number} of {name}:\n" + "\n".join(_by_text(lines))


def verdict(world: int, reports: Mapping[int, Report], *, timeout_s: float, error: str = "") -> str:
    """The message: what every rank does now, where they parted, and what to look for."""
    lines = {rank: _situation(reports.get(rank)) for rank in range(world)}
    parted = first_difference(reports)
    missing = [rank for rank in range(world) if rank not in reports]
    head = "ranks no longer do the same, so the job cannot go on"
    if missing:
        head = f"rank {_ranks(missing)} is gone, so the job cannot go on"
    text = [head, *_by_text(lines)]
    if parted:
        text.append(parted)
    elif error and not missing and not any(report.left for report in reports.values()):
        text.append(f"the connection failed: {error.splitlines()[0]}")
    text.append(
        "Every rank must make the same collective calls: the same number of batches and tokens, no branch, "
        "save or evaluation on one rank alone (ds_zero.join takes uneven data). If a rank was only slow, "
        f"raise the limit of {timeout_s:g} s: DS_TIMEOUT_S, or Topology(...).build(timeout_s=...)"
    )
    return "\n".join(text)


def _situation(report: Report | None) -> str:
    if report is None:
        return "does not answer: it was killed, or its machine or network is gone"
    if report.left:
        return f"has left: {report.left}"
    if report.waits is None:
        return f"waits for no other rank; it is at {report.where or 'an unknown line'}"
    name, lane = report.waits
    flight = lane.issued(lane.waiting)
    what = f"{flight.what}, called at {flight.where or report.where or '?'}" if flight else "a collective"
    return f"waits in collective {lane.waiting} of {name}: {what}"


def _by_text(lines: Mapping[int, str]) -> list[str]:
    """One line for all ranks of which the same is to be said."""
    ranks: dict[str, list[int]] = {}
    for rank, line in lines.items():
        ranks.setdefault(line, []).append(rank)
    return [f"  rank {_ranks(found)} {line}" for line, found in list(ranks.items())[:_SHOWN_RANKS]]


def _ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
