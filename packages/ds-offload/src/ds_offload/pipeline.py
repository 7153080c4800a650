"""A step plan carried out: fetch i+1 | update i | flush i-1."""

from __future__ import annotations

from collections.abc import Sequence

from ds_offload.buffers import Turns
from ds_offload.chunk import ChunkUpdate, Loaded
from ds_offload.plan import StepPlan
from ds_offload.work import Work


def run_plan(plan: StepPlan, works: Sequence[Work], chunks: ChunkUpdate, turns: Turns) -> None:
    """Update the plan's chunks of `works`, in order. Afterwards everything is where it lives.

    Raises AioError, and whatever the optimizer raises; no buffer is in use then.
    """
    loaded: dict[int, Loaded] = {}
    try:
        for fetched, updated, _ in plan.rounds():
            for index in fetched:
                chunk = plan.chunks[index]
                loaded[index] = chunks.fetch(chunk, works[chunk.unit], turns[index])
            now = loaded.pop(updated)
            chunks.update(now)
            chunks.flush(now)
        turns.empty()
    except BaseException:
        for left in loaded.values():
            for future in left.reading:
                future.exception()
        turns.abandon()
        raise
