"""What rounding has lost of DDP's buckets, by parameter, so that it survives when they are cut anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a parameter is in a bucket."""

    name: str
    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True, slots=True)
class BucketErrors:
    """`worker` [world * each]: what this rank's gradients still owe. `server` [each]: what the mean of this
    rank's chunk still owes. fp32, the bucket's own order."""

    pieces: tuple[Piece, ...]
    worker: Tensor
    server: Tensor


class BucketMemory:
    """The errors of all buckets of one rank.

    DDP cuts its buckets anew after the first iteration. An error of the mean then belongs to a chunk that may
    be another rank's: it moves to this rank's gradient errors, times the number of ranks, which adds the same
    to the next mean. Nothing is sent, and nothing is lost.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._buckets: dict[tuple[Piece, ...], BucketErrors] = {}
        self._loose: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (worker, server), in the param's shape

    def of(self, pieces: Sequence[Piece], numel: int, device: torch.device) -> BucketErrors:
        """The errors of a bucket of `numel` elements; zeros where none are known."""
        key = tuple(pieces)
        if key not in self._buckets:
            names = {piece.name for piece in key}
            if any(not names.isdisjoint(p.name for p in known) for known in self._buckets):
                self._loosen()  # buckets are cut anew
            self._buckets[key] = self._make(key, numel, device)
        return self._buckets[key]

    def _make(self, pieces: tuple[Piece, ...], numel: int, device: torch.device) -> BucketErrors:
        each = -(-numel // self._world)
        worker = torch.zeros(each * self._world, device=device)
        server = torch.zeros_like(worker)
        for piece in pieces:
            known = self._loose.pop(piece.name, None)
            if known is not None:
                worker[piece.start : piece.end] = known[0].view(-1)
                server[piece.start : piece.end] = known[1].view(-1)
        begin, end = self._rank * each, (self._rank + 1) * each
        mine = server[begin:end].clone()
        server[begin:end] = 0
        worker.add_(server, alpha=self._world)
        return BucketErrors(pieces, worker, mine)

    def _loosen(self) -> None:
        self._loose.update(self.by_name())
        self._buckets.clear()

    def by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(worker, server) of every parameter in its shape; server is 0 outside of this rank's chunks."""
        found = {name: (worker.clone(), server.clone()) for name, (worker, server) in self._loose.items()}
        for bucket in self._buckets.values():
            server = torch.zeros_like(bucket.worker)
            each = bucket.server.numel()
            server[self._rank * each : (self._rank + 1) * each] = bucket.server
            for piece in bucket.pieces:
                part = slice(piece.start, piece.end)
                mine, sums = bucket.worker[part], server[part]
                found[piece.name] = mine.view(piece.shape), sums.view(piece.shape)
        return {name: (worker.clone(), server.clone()) for name, (worker, server) in found.items()}

    def replace(self, errors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Go on from these."""
        self._buckets.clear()
        self._loose = {name: (worker.clone(), server.clone()) for name, (worker, server) in errors.items()}
