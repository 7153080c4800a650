"""Ways for bytes between gloo ranks: several routes for one exchange, and the measurement that chooses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.ground.ticket import Ticket, Waitable

_TOLD_BYTES = 512
_PROBE_FROM_BYTES = 1 << 20  # smaller messages are not worth choosing a route for
_PROBE_ROUNDS = 3
_PROBE_SLOW_S = 0.25  # of one message of at most 16 MiB
_DIRECT_BONUS = 0.7  # the other routes copy what they carry: they must be faster by more than noise

_Route = Callable[[Tensor, Tensor, int], list[Waitable]]


class Routes:
    """All-gather and all-to-all over one gloo group. Which route is fastest is measured once for each op and
    size class, and all ranks take rank 0's choice.

    Messages between the same two ranks are told apart by `tag`, the same on both.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self._group: ProcessGroup | None = group
        self._name = name
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._chosen: dict[tuple[str, int], _Route] = {}

    @property
    def group(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(
                f"the process group along {self._name!r} was closed by leave_distributed(): build a new "
                "mesh, and model and optimizer on it"
            )
        return self._group

    def close(self) -> None:
        self._group = None

    def tell(self, message: bytes) -> list[bytes]:
        """Every rank's message of up to 512 bytes, by rank. Collective."""
        assert len(message) <= _TOLD_BYTES, message
        sent = message.ljust(_TOLD_BYTES, b"\0") + len(message).to_bytes(2, "little")
        rows = torch.empty(self.world, len(sent), dtype=torch.uint8)
        rows[self.rank] = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
        for work in self.exchange([rows[self.rank]] * self.world, list(rows), 0):
            work.wait()
        told = [bytes(row.tolist()) for row in rows]
        return [each[: int.from_bytes(each[_TOLD_BYTES:], "little")] for each in told]

    def all_gather(self, out: Tensor, mine: Tensor, tag: int) -> list[Waitable]:
        """[world * n] <- [n], which is this rank's part of `out` already."""
        return self._route("all_gather", out.nbytes)(out, mine, tag)

    def all_to_all(self, src: Tensor, tag: int, chunks: list[Tensor]) -> list[Waitable]:
        """Chunk r of `src` [world * n] to rank r; `chunks` is filled with what comes, by rank.

        This rank's own chunk is not copied.
        """
        parts = list(src.view(self.world, -1))
        if (route := self._route("all_to_all", src.nbytes)) == self._exchange_direct:
            chunks += src.new_empty(self.world - 1, parts[0].numel())
            chunks.insert(self.rank, parts[self.rank])
            return self.exchange(parts, chunks, tag)
        received = torch.empty_like(src)
        chunks += received.view(self.world, -1)
        chunks[self.rank] = parts[self.rank]
        return route(received, src, tag)

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int) -> list[Waitable]:
        """sent[r] to rank r and received[r] from it, for every other rank."""
        works: list[Waitable] = []
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            works += works_of(dist.irecv(received[source], group=self.group, group_src=source, tag=tag))
            works += works_of(dist.isend(sent[to], group=self.group, group_dst=to, tag=tag))
        return works

    def send_from(self, root: int, tensor: Tensor, tag: int) -> list[Waitable]:
        """`tensor` from rank `root` to every other rank."""
        if self.rank != root:
            return works_of(dist.irecv(tensor, group=self.group, group_src=root, tag=tag))
        works: list[Waitable] = []
        for other in range(self.world):
            if other != root:
                works += works_of(dist.isend(tensor, group=self.group, group_dst=other, tag=tag))
        return works

    def _gather_direct(self, out: Tensor, mine: Tensor, tag: int) -> list[Waitable]:
        return self.exchange([mine] * self.world, list(out.view(self.world, -1)), tag)

    def _gather_broadcasts(self, out: Tensor, mine: Tensor, tag: int) -> list[Waitable]:
        parts = out.view(self.world, -1)
        works: list[Waitable] = []
        for root in range(self.world):
            works += works_of(dist.broadcast(parts[root], group=self.group, group_src=root, async_op=True))
        return works

    def _gather_native(self, out: Tensor, mine: Tensor, tag: int) -> list[Waitable]:
        return [native_all_gather(out, mine, self.group)]

    def _exchange_direct(self, out: Tensor, src: Tensor, tag: int) -> list[Waitable]:
        """Chunk r of `src` to rank r; this rank's own chunk of `out` is left alone."""
        return self.exchange(list(src.view(self.world, -1)), list(out.view(self.world, -1)), tag)

    def _exchange_native(self, out: Tensor, src: Tensor, tag: int) -> list[Waitable]:
        return works_of(dist.all_to_all_single(out, src, group=self.group, async_op=True))

    def _route(self, op: str, nbytes: int) -> _Route:
        """The fastest candidate for this op and size class (powers of four from 1 MiB)."""
        candidates: tuple[_Route, ...]
        if op == "all_gather":
            candidates = (self._gather_direct, self._gather_broadcasts, self._gather_native)
        else:
            candidates = (self._exchange_direct, self._exchange_native)
        if nbytes < _PROBE_FROM_BYTES:
            return candidates[0]
        key = (op, nbytes.bit_length() // 2)
        if key not in self._chosen:
            self._chosen[key] = self._probe(op, nbytes, candidates)
        return self._chosen[key]

    def _probe(self, op: str, nbytes: int, candidates: tuple[_Route, ...]) -> _Route:
        """Time each candidate on scratch buffers; collective. Rank 0's choice is everybody's."""
        nbytes = min(nbytes, 1 << 24) // self.world * self.world
        out = torch.zeros(nbytes, dtype=torch.uint8)
        src = out.view(self.world, -1)[self.rank] if op == "all_gather" else torch.zeros_like(out)

        def lap(candidate: _Route) -> float:
            dist.barrier(group=self.group)
            began = time.perf_counter()
            Ticket(candidate(out, src, 0)).wait()
            return time.perf_counter() - began

        first = self._from_first(lap(candidates[0]))
        if first > _PROBE_SLOW_S:  # the wire is the limit, and every route sends as many bytes
            return candidates[0]
        best = [min(lap(candidate) for _ in range(_PROBE_ROUNDS)) for candidate in candidates]
        best[0] *= _DIRECT_BONUS
        return candidates[int(self._from_first(min(range(len(best)), key=best.__getitem__)))]

    def _from_first(self, value: float) -> float:
        """Rank 0's value on every rank."""
        told = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(told, group=self.group, group_src=0)
        return float(told)


def native_all_gather(out: Tensor, shard: Tensor, group: ProcessGroup) -> Waitable:
    """torch renamed this collective between 2.11 and 2.13; old and new take the same arguments."""
    op: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Waitable = op(out, shard, group=group, async_op=True)
    return work


def native_reduce_scatter(out: Tensor, full: Tensor, group: ProcessGroup) -> Waitable:
    op: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: Waitable = op(out, full, group=group, async_op=True)
    return work


def works_of(work: Waitable | None) -> list[Waitable]:
    return [] if work is None else [work]
