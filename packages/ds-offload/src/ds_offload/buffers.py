"""Buffers that chunks pass through: a few turns of page-aligned memory, reused in every step."""

from __future__ import annotations

from concurrent.futures import Future

import torch
from torch import Tensor

from ds_offload.mapped import Mapping


class Turn:
    """One set of buffers. A buffer is named; it is made when it is first asked for and grows when it must."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory: dict[str, Mapping] = {}
        self.flushing: list[Future[int]] = []  # writes that still read from these buffers

    def buffer(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Flat, of arbitrary contents."""
        wanted = numel * dtype.itemsize
        mapping = self._memory.get(name)
        if mapping is None or mapping.nbytes < wanted:
            mapping = self._memory[name] = Mapping(wanted)
            if self._pinned:
                mapping.pin()
        return mapping.tensor[:wanted].view(dtype)

    def memory(self, name: str) -> Mapping:
        """What is behind a buffer."""
        return self._memory[name]

    @property
    def nbytes(self) -> int:
        return sum(mapping.nbytes for mapping in self._memory.values())

    def empty(self) -> None:
        """Wait until nothing reads from the buffers. Raises AioError for a write that failed."""
        while self.flushing:
            self.flushing.pop(0).result()

    def abandon(self) -> None:
        """Wait in any case, whatever became of the writes."""
        while self.flushing:
            self.flushing.pop(0).exception()


class Turns:
    """`depth` turns that take turns."""

    def __init__(self, depth: int, *, pinned: bool) -> None:
        self._turns = [Turn(pinned=pinned) for _ in range(depth)]

    def __getitem__(self, index: int) -> Turn:
        return self._turns[index % len(self._turns)]

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(turn.nbytes for turn in self._turns)

    def empty(self) -> None:
        for turn in self._turns:
            turn.empty()

    def abandon(self) -> None:
        for turn in self._turns:
            turn.abandon()
