"""The plain wire: torch.distributed collectives by the best route each backend has, with a byte log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.ground.ticket import Ticket, Waitable

_SUM_BLOCK = 1 << 18  # elements summed at a time: three fp32 blocks of it stay in cache
_PROBE_FROM_BYTES = 1 << 20  # smaller messages are not worth choosing a route for
_PROBE_ROUNDS = 3
_DIRECT_BONUS = 0.7  # the other routes copy what they carry: they must be faster by more than noise


@dataclass
class WireLog:
    """Counts what was sent. Keys are (axis, op)."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    elements: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def record(self, axis: str, op: str, elements: int, sent_bytes: int) -> None:
        """`elements`: of the whole tensor, as the papers count; `sent_bytes`: what this rank hands out."""
        self.calls[axis, op] += 1
        self.elements[axis, op] += elements
        self.sent_bytes[axis, op] += sent_bytes

    def bytes_by_axis(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for (axis, _), sent in self.sent_bytes.items():
            totals[axis] += sent
        return dict(totals)

    def clear(self) -> None:
        for counter in (self.calls, self.elements, self.sent_bytes):
            counter.clear()


def sum_chunks(out: Tensor, chunks: Iterable[Tensor], *, scale: float, accumulate: bool) -> None:
    """out = scale * sum(chunks) in `out`'s dtype, first chunk first; added to `out` with `accumulate`.

    Works in blocks that stay in cache: a plain mixed-dtype `add_` over a large tensor is four times slower.
    Shapes: out [n], each chunk [n] in any float dtype.
    """
    first, *rest = chunks
    n = out.numel()
    if not accumulate and not rest and scale == 1.0:
        out.copy_(first)
        return
    width = min(n, _SUM_BLOCK) if out.device.type == "cpu" else n
    total = torch.empty(width, dtype=out.dtype, device=out.device) if accumulate else None
    spare = torch.empty(width, dtype=out.dtype, device=out.device)
    for start in range(0, n, max(1, width)):
        part = slice(start, min(start + width, n))
        here = out[part]
        block = here if total is None else total[: here.numel()]
        block.copy_(first[part])
        for chunk in rest:
            if chunk.dtype == out.dtype:
                block.add_(chunk[part])
            else:
                block.add_(spare[: here.numel()].copy_(chunk[part]))
        if total is not None:
            here.add_(block, alpha=scale)
        elif scale != 1.0:
            block.mul_(scale)


class LocalCommunicator:
    """A group of one rank: every collective is a local copy."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.device)

    def all_gather(self, out: Tensor, shard: Tensor) -> Ticket:
        if out.data_ptr() != shard.data_ptr() or out.device.type == "meta":
            out.copy_(shard)
        return Ticket()

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False
    ) -> Ticket:
        sum_chunks(out, [full], scale=scale, accumulate=accumulate)
        return Ticket()

    def all_reduce(self, tensor: Tensor, *, op: str = "sum") -> Ticket:
        return Ticket()

    def all_to_all(self, out: Tensor, src: Tensor) -> Ticket:
        out.copy_(src)
        return Ticket()

    def broadcast(self, tensor: Tensor, *, root: int = 0) -> Ticket:
        return Ticket()


_Exchange = Callable[[Tensor, Tensor], list[Waitable]]


class TorchCommunicator:
    """Collectives over one process group.

    On gloo, whose reduce-scatter and all-gather are slow and whose asynchronous reduce-scatter cannot be
    waited for, both are built from exchanges. Every candidate gives the same bits: reductions are summed
    here, in rank order, in the output's dtype. Which exchange is fastest is measured once for each op and
    size class, and all ranks take rank 0's choice.

    [Note: order on the wire] gloo matches operations by the order in which each rank issues them, so
    collectives whose order may differ between ranks belong to different groups (Mesh channels).
    """

    def __init__(
        self, group: ProcessGroup, device: torch.device, *, log: WireLog | None = None, axis: str = "world"
    ) -> None:
        self._group: ProcessGroup | None = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self.axis = axis
        self.log = log if log is not None else WireLog()
        self._native = dist.get_backend(group) != "gloo"
        self._routes: dict[tuple[str, int], _Exchange] = {}
        self._tag = 0

    @property
    def group(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(
                f"the process group along {self.axis!r} was closed by leave_distributed(): build a new mesh, "
                "and model and optimizer on it"
            )
        return self._group

    def close(self) -> None:
        """Let go of the process group; the last one to do so waits for its threads."""
        self._group = None

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.device)

    def all_gather(self, out: Tensor, shard: Tensor) -> Ticket:
        self._record("all_gather", out.numel(), shard.nbytes * (self.world - 1))
        if self._native:
            return Ticket([_all_gather(out, shard, self.group)], keepalive=(out, shard))
        mine = out.view(self.world, -1)[self.rank]
        if mine.data_ptr() != shard.data_ptr():
            mine.copy_(shard)
        works = self._route("all_gather", out.nbytes)(out, mine)
        return Ticket(works, keepalive=(out, mine))

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False
    ) -> Ticket:
        self._record("reduce_scatter", full.numel(), full.nbytes // self.world * (self.world - 1))
        if self._native:
            wire = self.allocate(out.numel(), full.dtype)
            if full.dtype == torch.float16:  # the backend sums in fp16, which might not hold the sum
                full, scale = full * scale, 1.0
            work = _reduce_scatter(wire, full, self.group)

            def keep() -> None:
                sum_chunks(out, [wire], scale=scale, accumulate=accumulate)

            return Ticket([work], keepalive=(full, wire), finish=keep)
        parts = list(full.view(self.world, -1))
        if (route := self._route("all_to_all", full.nbytes)) == self._exchange_direct:
            chunks = list(
                self.allocate(full.numel() - out.numel(), full.dtype).view(self.world - 1, out.numel())
            )
            chunks.insert(self.rank, parts[self.rank])
            works = self._exchange(parts, chunks)
        else:
            received = self.allocate(full.numel(), full.dtype)
            works = route(received, full)
            chunks = list(received.view(self.world, -1))
            chunks[self.rank] = parts[self.rank]

        def finish() -> None:
            sum_chunks(out, chunks, scale=scale, accumulate=accumulate)

        return Ticket(works, keepalive=(full, *chunks), finish=finish)

    def all_reduce(self, tensor: Tensor, *, op: str = "sum") -> Ticket:
        sent = 2 * tensor.nbytes * (self.world - 1) // self.world
        self._record("all_reduce", 2 * tensor.numel(), sent)
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        if op not in kinds:
            raise ValueError(f'all_reduce op must be "sum" or "max", got {op!r}')
        work = dist.all_reduce(tensor, op=kinds[op], group=self.group, async_op=True)
        return Ticket(_works(work), keepalive=(tensor,))

    def all_to_all(self, out: Tensor, src: Tensor) -> Ticket:
        self._record("all_to_all", src.numel(), src.nbytes // self.world * (self.world - 1))
        work = dist.all_to_all_single(out, src, group=self.group, async_op=True)
        return Ticket(_works(work), keepalive=(out, src))

    def broadcast(self, tensor: Tensor, *, root: int = 0) -> Ticket:
        self._record("broadcast", tensor.numel(), tensor.nbytes if root == self.rank else 0)
        work = dist.broadcast(tensor, group_src=root, group=self.group, async_op=True)
        return Ticket(_works(work), keepalive=(tensor,))

    def _record(self, op: str, elements: int, sent_bytes: int) -> None:
        self.log.record(self.axis, op, elements, sent_bytes)

    # -- routes on gloo ------------------------------------------------------------------------------------

    def _exchange(self, sent: list[Tensor], received: list[Tensor]) -> list[Waitable]:
        """sent[r] to rank r and received[r] from it, for every other rank.

        Each exchange has a tag of its own: two in flight between the same ranks never mix.
        """
        self._tag += 1
        works: list[Waitable] = []
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            works += _works(dist.irecv(received[source], group=self.group, group_src=source, tag=self._tag))
            works += _works(dist.isend(sent[to], group=self.group, group_dst=to, tag=self._tag))
        return works

    def _gather_direct(self, out: Tensor, mine: Tensor) -> list[Waitable]:
        return self._exchange([mine] * self.world, list(out.view(self.world, -1)))

    def _gather_broadcasts(self, out: Tensor, mine: Tensor) -> list[Waitable]:
        parts = out.view(self.world, -1)
        works: list[Waitable] = []
        for root in range(self.world):
            works += _works(dist.broadcast(parts[root], group=self.group, group_src=root, async_op=True))
        return works

    def _gather_native(self, out: Tensor, mine: Tensor) -> list[Waitable]:
        return [_all_gather(out, mine, self.group)]

    def _exchange_direct(self, out: Tensor, src: Tensor) -> list[Waitable]:
        """Chunk r of `src` to rank r; this rank's own chunk of `out` is left alone."""
        return self._exchange(list(src.view(self.world, -1)), list(out.view(self.world, -1)))

    def _exchange_native(self, out: Tensor, src: Tensor) -> list[Waitable]:
        return _works(dist.all_to_all_single(out, src, group=self.group, async_op=True))

    def _route(self, op: str, nbytes: int) -> _Exchange:
        """The fastest candidate for this op and size class (powers of four from 1 MiB)."""
        candidates: tuple[_Exchange, ...]
        if op == "all_gather":
            candidates = (self._gather_direct, self._gather_broadcasts, self._gather_native)
        else:
            candidates = (self._exchange_direct, self._exchange_native)
        if nbytes < _PROBE_FROM_BYTES:
            return candidates[0]
        key = (op, nbytes.bit_length() // 2)
        if key not in self._routes:
            self._routes[key] = self._probe(op, nbytes, candidates)
        return self._routes[key]

    def _probe(self, op: str, nbytes: int, candidates: tuple[_Exchange, ...]) -> _Exchange:
        """Time each candidate on scratch buffers; collective. Rank 0's choice is everybody's."""
        nbytes = min(nbytes, 1 << 24) // self.world * self.world
        out = torch.zeros(nbytes, dtype=torch.uint8)
        src = out.view(self.world, -1)[self.rank] if op == "all_gather" else torch.zeros_like(out)
        best = []
        for candidate in candidates:
            times = []
            for _ in range(_PROBE_ROUNDS):
                dist.barrier(group=self.group)
                began = time.perf_counter()
                Ticket(candidate(out, src)).wait()
                times.append(time.perf_counter() - began)
            best.append(min(times))
        best[0] *= _DIRECT_BONUS
        choice = torch.tensor([min(range(len(best)), key=best.__getitem__)])
        dist.broadcast(choice, group=self.group, group_src=0)
        return candidates[int(choice)]


def _works(work: Waitable | None) -> list[Waitable]:
    return [] if work is None else [work]


def _all_gather(out: Tensor, shard: Tensor, group: ProcessGroup) -> Waitable:
    """torch renamed this collective between 2.11 and 2.13; old and new take the same arguments."""
    op: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Waitable = op(out, shard, group=group, async_op=True)
    return work


def _reduce_scatter(out: Tensor, full: Tensor, group: ProcessGroup) -> Waitable:
    op: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: Waitable = op(out, full, group=group, async_op=True)
    return work
