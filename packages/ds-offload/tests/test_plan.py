"""The order of an update: every element once, whole pages, never more turns than there are, as printed."""

from __future__ import annotations

import random

import pytest

from ds_offload.plan import Chunk, StepPlan, plan_chunks
from ds_offload.policy import PAGE_NUMEL

SIZES = [1, 2, PAGE_NUMEL - 1, PAGE_NUMEL, PAGE_NUMEL + 1, 3 * PAGE_NUMEL, 3 * PAGE_NUMEL + 5, 1_000_003]


def covers(chunks: list[Chunk], numel: int) -> bool:
    """Every element once, in order."""
    at = 0
    for chunk in chunks:
        if chunk.begin != at or chunk.end <= chunk.begin:
            return False
        at = chunk.end
    return at == numel


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("chunk_numel", [PAGE_NUMEL, PAGE_NUMEL + 100, 5 * PAGE_NUMEL, 1 << 22])
def test_chunks_cover_a_shard_in_whole_pages(numel: int, chunk_numel: int) -> None:
    chunks = plan_chunks(7, numel, chunk_numel)
    assert covers(chunks, numel)
    assert {chunk.unit for chunk in chunks} == {7}
    assert all(chunk.begin % PAGE_NUMEL == 0 for chunk in chunks)
    assert max(chunk.numel for chunk in chunks) <= -(-chunk_numel // PAGE_NUMEL) * PAGE_NUMEL
    whole = [chunk.numel for chunk in chunks[:-1]]
    assert not whole or max(whole) == min(whole)  # about equal


def test_nothing_has_no_chunks() -> None:
    assert plan_chunks(0, 0, PAGE_NUMEL) == []
    assert plan_chunks(0, 0, PAGE_NUMEL, []) == []


@pytest.mark.parametrize("seed", range(30))
def test_cuts_are_respected_and_chunks_no_larger_than_they_must_be(seed: int) -> None:
    rng = random.Random(seed)
    ends, at = [], 0
    for _ in range(rng.randint(1, 30)):
        at += rng.choice([1, 50, 4000, 9000, 20000])
        ends.append(at)
    chunk_numel = rng.choice([PAGE_NUMEL, 2 * PAGE_NUMEL, 10 * PAGE_NUMEL])
    numel = at + rng.choice([0, 13])  # padding
    chunks = plan_chunks(0, numel, chunk_numel, ends)
    assert covers(chunks, numel)
    allowed = {0, numel, *ends}
    for chunk in chunks:
        assert {chunk.begin, chunk.end} <= allowed
        inside = [cut for cut in allowed if chunk.begin < cut < chunk.end]
        assert chunk.numel <= chunk_numel or not inside


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("depth", range(1, 17))
def test_a_chunk_is_fetched_once_before_its_update_and_turns_are_never_too_few(
    count: int, depth: int
) -> None:
    plan = StepPlan(tuple(Chunk(0, at, at + 1) for at in range(count)), depth, 4)
    fetched: list[int] = []
    for number, (starting, updated, flushed) in enumerate(plan.rounds()):
        fetched += starting
        assert updated == number
        assert updated in fetched
        assert flushed == (number - 1 if number else None)
        # Fetched and not flushed yet, with the flush that is under way.
        live = [index for index in fetched if index >= (updated if flushed is None else flushed)]
        if depth > 2:
            assert len(live) <= depth
        # The turn that a fetch takes is free of chunks that are still to be updated.
        assert all(index - updated < depth for index in fetched)
    assert fetched == list(range(count))


def test_the_peak_is_of_the_turns_and_not_of_the_model() -> None:
    chunks = tuple(plan_chunks(0, 100 * PAGE_NUMEL, PAGE_NUMEL))
    assert StepPlan(chunks, 3, 16).peak_bytes == 3 * PAGE_NUMEL * 16
    assert StepPlan(chunks[:2], 3, 16).peak_bytes == 2 * PAGE_NUMEL * 16
    assert StepPlan((), 3, 16).peak_bytes == 0


def test_a_plan_prints_itself() -> None:
    chunks = (*plan_chunks(0, 3 * PAGE_NUMEL, PAGE_NUMEL), *plan_chunks(1, 100, PAGE_NUMEL))
    assert str(StepPlan(chunks, 3, 16)) == "\n".join(
        [
            "4 chunks, depth 3, peak 0.2 MB",
            "fetch F0 F1        | update U0    unit 0 [0, 4096)                 | flush -",
            "fetch F2           | update U1    unit 0 [4096, 8192)              | flush W0",
            "fetch F3           | update U2    unit 0 [8192, 12288)             | flush W1",
            "fetch -            | update U3    unit 1 [0, 100)                  | flush W2",
        ]
    )
