"""The order of an update whose state is elsewhere, and its peak bytes, before it runs (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_offload.policy import PAGE_NUMEL


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [begin, end) of one unit's shard, which are fetched, updated and flushed together."""

    unit: int
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks in their order. In round i chunk i + ahead is fetched, chunk i updated, chunk i - 1 flushed.

    `depth` buffers take turns, so the peak is `depth` chunks of `chunk_bytes`, however large the model.
    """

    chunks: tuple[Chunk, ...]
    depth: int
    bytes_per_element: int

    @property
    def ahead(self) -> int:
        """How many chunks are fetched ahead of the one that is updated."""
        return max(0, self.depth - 2) if self.depth != 2 else 1

    @property
    def peak_bytes(self) -> int:
        """Of the buffers that chunks pass through."""
        largest = max((chunk.numel for chunk in self.chunks), default=0)
        return min(self.depth, len(self.chunks)) * largest * self.bytes_per_element

    def rounds(self) -> list[tuple[list[int], int, int | None]]:
        """(chunks whose fetch starts, the chunk that is updated, the one whose flush is under way)."""
        count, found, started = len(self.chunks), [], 0
        for at in range(count):
            wanted = min(count, at + 1 + self.ahead)
            found.append((list(range(started, wanted)), at, at - 1 if at else None))
            started = max(started, wanted)
        return found

    def __str__(self) -> str:
        lines = [f"{len(self.chunks)} chunks, depth {self.depth}, peak {self.peak_bytes / 1e6:.1f} MB"]
        for fetched, updated, flushed in self.rounds():
            chunk = self.chunks[updated]
            ahead = " ".join(f"F{index}" for index in fetched) or "-"
            behind = "-" if flushed is None else f"W{flushed}"
            what = f"unit {chunk.unit} [{chunk.begin}, {chunk.end})"
            lines.append(f"fetch {ahead:12} | update U{updated:<4} {what:32} | flush {behind}")
        return "\n".join(lines)


def plan_chunks(unit: int, numel: int, chunk_numel: int, cuts: Sequence[int] | None = None) -> list[Chunk]:
    """One unit's shard of `numel` elements in chunks of at most `chunk_numel`, about equal, in whole pages.

    `cuts`: the only places where it may be cut (an optimizer that sees whole parameters); a stretch between
    two of them may then be larger than a chunk.
    """
    if cuts is not None:
        return list(_between(unit, numel, chunk_numel, sorted({*cuts, 0, numel})))
    count = max(1, -(-numel // chunk_numel))
    each = -(-numel // count)
    each = max(1, -(-each // PAGE_NUMEL)) * PAGE_NUMEL
    return [Chunk(unit, at, min(numel, at + each)) for at in range(0, numel, each)]


def _between(unit: int, numel: int, chunk_numel: int, cuts: Sequence[int]) -> Iterable[Chunk]:
    begin = last = 0
    for cut in cuts[1:]:
        if cut - begin > chunk_numel and last > begin:
            yield Chunk(unit, begin, last)
            begin = last
        last = cut
    if begin < numel:
        yield Chunk(unit, begin, numel)
