"""Verdicts from reports alone, and the record they come from."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_core.ground.desync import DesyncError, Issued, LaneReport, Report, cannot_go_on, verdict
from ds_core.ground.flight import RING, Lane, is_one_signature, signature
from ds_core.ground.mesh import Topology, leave_distributed, timeout_seconds
from ds_core.testing.distributed import distributed

ALL = (0, 1)


def lane(number: int, waiting: int = 0, what: str = "all_gather of a", where: str = "train.py:1 in main"):
    issued = tuple(
        Issued(n, what if n == number else "all_gather of a", n, where) for n in range(1, number + 1)
    )
    return LaneReport(number, waiting, ALL, issued)


def test_a_rank_that_is_slow_is_not_accused() -> None:
    reports = {0: Report("", lanes={"g": lane(3, 3)}), 1: Report("data.py:5 in load", lanes={"g": lane(2)})}
    assert not cannot_go_on(0, reports)
    assert "rank 1 waits for no other rank; it is at data.py:5 in load" in verdict(2, reports, timeout_s=60)


def test_nobody_waits_for_a_rank_that_has_left() -> None:
    reports = {0: Report("", lanes={"g": lane(3, 3)}), 1: Report("", "its script ended", {"g": lane(2)})}
    assert cannot_go_on(0, reports)
    assert not cannot_go_on(0, reports | {1: Report("", "its script ended", {"g": lane(3)})})


def test_another_collective_in_the_same_place() -> None:
    other = lane(3, what="reduce_scatter of b", where="eval.py:9 in run")
    reports = {0: Report("", lanes={"g": lane(3, 3)}), 1: Report("", lanes={"g": other})}
    assert cannot_go_on(0, reports)
    text = verdict(2, reports, timeout_s=60)
    assert "ranks parted at collective 1 of g" in text  # already the lines of the first one differ
    assert "eval.py:9 in run" in text


def test_two_that_wait_for_each_other() -> None:
    zero = Report("", lanes={"g": lane(3, 3), "r": lane(1)})
    one = Report("", lanes={"g": lane(2), "r": lane(2, 2)})
    assert cannot_go_on(0, {0: zero, 1: one})
    assert cannot_go_on(1, {0: zero, 1: one})
    come = Report("", lanes={"g": lane(2), "r": lane(1, 1)})  # it waits for what rank 0 has issued
    assert not cannot_go_on(0, {0: zero, 1: come})


def test_a_silent_rank_is_gone_and_ranks_are_told_in_ranges() -> None:
    reports = {rank: Report("", lanes={"g": lane(3, 3)}) for rank in (0, 1, 2, 4)}
    text = verdict(5, reports, timeout_s=60, error="Connection closed by peer")
    assert text.startswith("rank 3 is gone")
    assert "  rank 0-2, 4 waits in collective 3 of g: all_gather of a, called at train.py:1 in main" in text
    assert "DS_TIMEOUT_S" in text
    assert "60 s" in text


def test_reports_cross_as_json() -> None:
    report = Report("a.py:1 in f", "", {"g": lane(2, 1)})
    assert Report.loads(report.dumps()) == report


def test_a_lane_remembers_the_last_ones_with_the_callers_line() -> None:
    record = Lane("g", [0])
    for number in range(RING + 10):
        flight = record.record("all_gather", torch.zeros(number), "unit")
    assert flight.number == RING + 10
    assert "in test_a_lane_remembers_the_last_ones_with_the_callers_line" in flight.where
    assert [f.number for f in record.recent()] == list(range(11, RING + 11))
    assert str(flight) == f"all_gather of unit, {RING + 9} x float32"


def test_signatures_tell_any_difference() -> None:
    one, other = Lane("g", [0]), Lane("g", [0])
    for record in (one, other):
        record.record("all_gather", torch.zeros(4), "a")
    assert signature([one]) == signature([other])
    other.record("all_gather", torch.zeros(4), "a")
    one.record("all_gather", torch.zeros(4), "b")
    largest = torch.maximum(torch.tensor(signature([one])), torch.tensor(signature([other]))).tolist()
    assert not is_one_signature(largest)
    assert is_one_signature(torch.tensor(signature([one])).tolist())


@distributed(world_size=2)
def test_the_limit_reaches_every_group(rank: int) -> None:
    mesh = Topology().build(timeout_s=33.0)
    for channel in ("reduce", "gather", "control"):
        group = mesh.communicator("dp_shard", channel).group  # type: ignore[attr-defined]
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout.total_seconds() == pytest.approx(0.9 * 33.0)


@distributed(world_size=2)
def test_a_quiet_difference_is_found_at_the_vote(rank: int) -> None:
    """What no wire would notice: both ranks issue as much, in another order."""
    mesh = Topology().build(timeout_s=20.0)
    lane = mesh.communicator("dp_shard", "gather").lane  # type: ignore[attr-defined]
    lane.record("all_gather", torch.zeros(8), "a" if rank else "b")
    votes = torch.tensor(signature([lane]))
    mesh.communicator("dp_shard", "control").all_reduce(votes, op="max").wait()
    assert not is_one_signature(votes.tolist())
    with pytest.raises(DesyncError, match=r"(?s)parted at collective 1 .*rank 0 all_gather of b.*rank 1"):
        lane.disagree()
    assert dist.is_initialized()
    leave_distributed()


def test_the_limit_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="DS_TIMEOUT_S='soon' must be a number of seconds"):
        timeout_seconds()
    monkeypatch.setenv("DS_TIMEOUT_S", "120")
    assert timeout_seconds() == 120
    assert timeout_seconds(5) == 5
    with pytest.raises(ValueError, match="above 0"):
        timeout_seconds(-1)
