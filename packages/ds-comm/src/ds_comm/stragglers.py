"""Who keeps the others waiting: when each rank issued the same collectives, compared (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# rank -> (lane key, number) -> (issued, arrived) in nanoseconds of that rank's clock; 0: not noticed
Stamps = Mapping[int, Mapping[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Straggler:
    """Of the collectives of one axis and op: who was last, and what it cost.

    `share`: of all time between the first and the last rank's issue, the part in which `rank` was the last.
    `late_ms`: how much later than the first each rank was, on average, by rank of the job.
    """

    rank: int
    share: float
    lost_ms: float
    late_ms: Mapping[int, float]
    calls: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A collective of this rank, and the ranks of its group."""

    axis: str
    op: str
    ranks: tuple[int, ...]


def plan_offsets(stamps: Stamps, me: int, calls: Mapping[tuple[int, int], Seen]) -> dict[int, int]:
    """What to add to each rank's stamps so that nothing arrives before it was sent; as little as that takes.

    In all but a broadcast every rank needs something of every other, so no rank's arrival lies before
    another's issue. That bounds the difference of two clocks from both sides: with one clock (ranks of a
    host) 0 is inside, else the nearest bound is taken. Nothing is sent for it.
    """
    found = {me: 0}
    for rank, theirs in stamps.items():
        low: int | None = None
        high: int | None = None
        for key, (issued, arrived) in theirs.items() if rank != me else ():
            mine, call = stamps[me].get(key), calls.get(key)
            if mine is None or call is None or rank not in call.ranks or call.op == "broadcast":
                continue
            if mine[1]:
                high = mine[1] - issued if high is None else min(high, mine[1] - issued)
            if arrived:
                low = mine[0] - arrived if low is None else max(low, mine[0] - arrived)
        offset = 0 if high is None else min(0, high)
        found[rank] = offset if low is None else max(offset, low)
    return found


def plan_stragglers(
    stamps: Stamps, me: int, calls: Mapping[tuple[int, int], Seen]
) -> dict[tuple[str, str], Straggler]:
    """(axis, op) -> who was late, from the collectives that all ranks of their group have stamps of."""
    offsets = plan_offsets(stamps, me, calls)
    late: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    lost: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    count: dict[tuple[str, str], int] = defaultdict(int)
    for key, call in calls.items():
        if not all(key in stamps.get(rank, {}) for rank in call.ranks):
            continue
        issued = {rank: stamps[rank][key][0] + offsets[rank] for rank in call.ranks}
        first, last = min(issued.values()), max(issued, key=lambda rank: issued[rank])
        where = call.axis, call.op
        count[where] += 1
        lost[where][last] += issued[last] - first
        for rank, at in issued.items():
            late[where][rank] += at - first
    return {
        where: _slowest(lost[where], late[where], calls_seen) for where, calls_seen in sorted(count.items())
    }


def _slowest(lost: Mapping[int, int], late: Mapping[int, int], calls: int) -> Straggler:
    rank = max(sorted(lost), key=lambda one: lost[one])
    total = sum(lost.values())
    means = {one: late[one] / calls / 1e6 for one in sorted(late)}
    return Straggler(rank, lost[rank] / total if total else 0.0, lost[rank] / 1e6, means, calls)


def as_rows(stamps: Mapping[tuple[int, int], tuple[int, int]], keep: int) -> Sequence[Sequence[int]]:
    """The last `keep` stamps as [keep, 4] whole numbers, zeros where there are fewer: what travels."""
    rows = [[lane, number, *times] for (lane, number), times in list(stamps.items())[-keep:]]
    return rows + [[0, 0, 0, 0]] * (keep - len(rows))


def from_rows(rows: Sequence[Sequence[int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """The inverse: collectives are numbered from 1."""
    return {(lane, number): (issued, arrived) for lane, number, issued, arrived in rows if number}
