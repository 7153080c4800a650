"""Who was late, by hand: lost time, shares, and clocks that do not agree."""

from __future__ import annotations

import pytest

from ds_comm.stragglers import Seen, as_rows, from_rows, plan_offsets, plan_stragglers

MS = 1_000_000
CALLS = {(7, number): Seen("data", "all_reduce", (0, 1, 2)) for number in (1, 2, 3)}


def times(*issued_ms: float, arrives_ms: float = 100.0) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (7, number): (int(at * MS), int((arrives_ms + 10 * number) * MS))
        for number, at in enumerate(issued_ms, 1)
    }


def test_the_slowest_rank_and_its_share() -> None:
    stamps = {0: times(10, 30, 50), 1: times(13, 36, 50), 2: times(11, 30, 51)}
    (found,) = plan_stragglers(stamps, 0, CALLS).values()
    assert found.rank == 1
    assert found.calls == 3
    assert found.lost_ms == pytest.approx(9)  # last in two of three: 3 and 6 ms
    assert found.share == pytest.approx(9 / 10)
    assert found.late_ms == pytest.approx({0: 0.0, 1: 3.0, 2: 2 / 3})


def test_a_collective_that_a_rank_no_longer_remembers_does_not_count() -> None:
    stamps = {0: times(10, 30, 50), 1: times(10, 30, 50), 2: times(19, 30)}
    (found,) = plan_stragglers(stamps, 0, CALLS).values()
    assert (found.calls, found.rank, found.share) == (2, 2, 1.0)


def test_nobody_late_is_nobody_to_blame() -> None:
    (found,) = plan_stragglers({rank: times(1, 2, 3) for rank in range(3)}, 0, CALLS).values()
    assert (found.lost_ms, found.share) == (0.0, 0.0)


def test_clocks_that_agree_are_left_alone() -> None:
    stamps = {0: times(10, 30, 50), 1: times(13, 36, 50), 2: times(11, 30, 51)}
    assert plan_offsets(stamps, 0, CALLS) == {0: 0, 1: 0, 2: 0}


def test_a_clock_that_contradicts_the_messages_is_corrected_as_little_as_that_takes() -> None:
    """Rank 1's clock is an hour ahead. It cannot have issued after rank 0 had its part."""
    hour = 3_600_000.0
    ahead = {key: (a + int(hour * MS), b + int(hour * MS)) for key, (a, b) in times(10, 30, 50).items()}
    stamps = {0: times(10, 30, 50), 1: ahead, 2: times(10, 30, 50)}
    offset = plan_offsets(stamps, 0, CALLS)[1] / MS
    assert -hour <= offset <= -hour + 100
    behind = {key: (a - int(hour * MS), b - int(hour * MS)) for key, (a, b) in times(10, 30, 50).items()}
    offset = plan_offsets({**stamps, 1: behind}, 0, CALLS)[1] / MS
    assert hour - 100 <= offset <= hour


def test_a_broadcast_says_nothing_about_clocks() -> None:
    calls = {key: Seen("data", "broadcast", (0, 1, 2)) for key in CALLS}
    late = {key: (a + 10**15, b + 10**15) for key, (a, b) in times(10, 30, 50).items()}
    assert plan_offsets({0: times(10, 30, 50), 1: late}, 0, calls)[1] == 0


def test_rows_and_back() -> None:
    stamps = times(10, 30, 50)
    assert from_rows(as_rows(stamps, 5)) == stamps
    assert from_rows(as_rows(stamps, 2)) == dict(list(stamps.items())[1:])
