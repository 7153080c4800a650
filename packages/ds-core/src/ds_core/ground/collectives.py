"""The plain wire: torch.distributed collectives by the best route each backend has, with a byte log."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.ground.fabric import Fabric, connect_fabric
from ds_core.ground.flight import Lane
from ds_core.ground.listener import Call, Coded, Departure, Listener
from ds_core.ground.routes import Routes, native_all_gather, native_reduce_scatter, works_of
from ds_core.ground.ticket import Ticket, Waitable

_SUM_BLOCK = 1 << 18  # elements summed at a time: three fp32 blocks of it stay in cache
_SMALL_BYTES = 1 << 12  # up to here every rank sends to every other: one hop, and signed
_SMALL_WORLD = 8


class _Here(threading.local):
    """What the collectives that this thread issues now stand for."""

    coded: Coded | None = None


@dataclass
class WireLog:
    """Counts what was sent. Keys are (axis, op). A `listener` hears of every collective besides."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    elements: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    listener: Listener | None = None
    here: _Here = field(default_factory=_Here)

    def record(self, axis: str, op: str, elements: int, sent_bytes: int) -> None:
        """`elements`: of the whole tensor, as the papers count; `sent_bytes`: what this rank hands out."""
        self.calls[axis, op] += 1
        self.elements[axis, op] += elements
        self.sent_bytes[axis, op] += sent_bytes

    def depart(
        self,
        axis: str,
        lane: Lane,
        op: str,
        tensor: Tensor,
        *,
        about: str,
        elements: int,
        sent_bytes: int,
    ) -> Departure:
        """Count a collective over `tensor` (whole, as it travels) and record it in its lane."""
        self.record(axis, op, elements, sent_bytes)
        flight = lane.record(op, tensor, about)
        if self.listener is None:
            return Departure(lane, flight)
        call = Call(axis, lane, flight, tensor.device, tensor.nbytes, sent_bytes, self.here.coded)
        return Departure(lane, flight, self.listener.begin(call))

    def bytes_by_axis(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for (axis, _), sent in self.sent_bytes.items():
            totals[axis] += sent
        return dict(totals)

    def clear(self) -> None:
        """A step ends, or begins: counts are of one step."""
        for counter in (self.calls, self.elements, self.sent_bytes):
            counter.clear()
        if self.listener is not None:
            self.listener.end_step()


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

    def all_gather(self, out: Tensor, shard: Tensor, *, about: str = "") -> Ticket:
        if out.data_ptr() != shard.data_ptr() or out.device.type == "meta":
            out.copy_(shard)
        return Ticket()

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        sum_chunks(out, [full], scale=scale, accumulate=accumulate)
        return Ticket()

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", about: str = "") -> Ticket:
        return Ticket()

    def all_to_all(self, out: Tensor, src: Tensor, *, about: str = "") -> Ticket:
        out.copy_(src)
        return Ticket()

    def broadcast(self, tensor: Tensor, *, root: int = 0, about: str = "") -> Ticket:
        return Ticket()


class TorchCommunicator:
    """Collectives over one process group.

    On gloo, whose reduce-scatter and all-gather are slow and whose asynchronous reduce-scatter cannot be
    waited for, they are built from exchanges (see Routes). Reductions are summed here, in rank order, in the
    output's dtype, so every route gives the same bits. After `connect`, CPU tensors go by a fabric instead
    (shared memory, with ds-comm), if all ranks have one.

    Each collective is recorded in `lane`, and waiting for it raises DesyncError when ranks disagree. What
    travels in exchanges carries its signature, so that collectives of two kinds are never taken for one
    another: gloo would take a shorter message silently and end the process on a longer one.

    [Note: order on the wire] Operations are matched by the order in which each rank issues them, so
    collectives whose order may differ between ranks belong to different groups (Mesh channels).
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        *,
        log: WireLog | None = None,
        axis: str = "world",
        lane: Lane | None = None,
    ) -> None:
        self._routes = Routes(group, axis)
        self.device = device
        self.rank = self._routes.rank
        self.world = self._routes.world
        self.axis = axis
        self.log = log if log is not None else WireLog()
        self.lane = lane or Lane(axis, dist.get_process_group_ranks(group))
        self._native = dist.get_backend(group) != "gloo"
        self._fabric: Fabric | None = None

    def connect(self, timeout_s: float) -> list[Waitable]:
        """From now on use what carries bytes faster than sockets, if every rank has it. Collective."""
        if not self._native and self.world > 1:
            self._fabric = connect_fabric(self.lane, self.rank, self._routes.tell, timeout_s)
        return []

    @property
    def route(self) -> str:
        """By what the bytes of CPU tensors go."""
        return self._fabric.name if self._fabric is not None else dist.get_backend(self.group)

    @property
    def group(self) -> ProcessGroup:
        return self._routes.group

    def close(self) -> None:
        """Let go of the process group; the last one to do so waits for its threads."""
        self._routes.close()
        if self._fabric is not None:
            self._fabric.close()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Where there is a fabric, memory that peers read as it is: what is sent from it is not copied."""
        if self._fabric is not None and self.device.type == "cpu":
            return self._fabric.allocate(numel, dtype)
        return torch.empty(numel, dtype=dtype, device=self.device)

    def all_gather(self, out: Tensor, shard: Tensor, *, about: str = "") -> Ticket:
        flight = self._record("all_gather", out, about, out.numel(), shard.nbytes * (self.world - 1))
        if (fabric := self._fabric_for(out)) is not None:
            return self._carry(flight, lambda: fabric.all_gather(out, shard, flight.flight))
        if self._native:
            work = flight.start(lambda: [native_all_gather(out, shard, self.group)])
            return Ticket([work], keepalive=(out, shard))
        mine = out.view(self.world, -1)[self.rank]
        if mine.data_ptr() != shard.data_ptr():
            mine.copy_(shard)
        work = flight.start(lambda: self._routes.all_gather(out, mine, flight.tag))
        return Ticket([work], keepalive=(out, mine))

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        sent = full.nbytes // self.world * (self.world - 1)
        flight = self._record("reduce_scatter", full, about, full.numel(), sent)
        if (fabric := self._fabric_for(full)) is not None:
            return self._carry(
                flight,
                lambda: fabric.reduce_scatter(out, full, flight.flight, scale=scale, accumulate=accumulate),
            )
        if self._native:
            wire = self.allocate(out.numel(), full.dtype)
            if full.dtype == torch.float16:  # the backend sums in fp16, which might not hold the sum
                full, scale = full * scale, 1.0
            work = flight.start(lambda: [native_reduce_scatter(wire, full, self.group)])

            def keep() -> None:
                sum_chunks(out, [wire], scale=scale, accumulate=accumulate)

            return Ticket([work], keepalive=(full, wire), finish=keep)
        chunks: list[Tensor] = []
        work = flight.start(lambda: self._routes.all_to_all(full, flight.tag, chunks))

        def finish() -> None:
            sum_chunks(out, chunks, scale=scale, accumulate=accumulate)

        return Ticket([work], keepalive=(full, *chunks), finish=finish)

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", about: str = "") -> Ticket:
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        if op not in kinds:
            raise ValueError(f'all_reduce op must be "sum" or "max", got {op!r}')
        small = not self._native and self.world <= _SMALL_WORLD and tensor.nbytes <= _SMALL_BYTES
        hops = self.world if small else 2
        sent = hops * tensor.nbytes * (self.world - 1) // self.world
        flight = self._record("all_reduce", tensor, about, 2 * tensor.numel(), sent)
        if (fabric := self._fabric_for(tensor)) is not None:
            return self._carry(flight, lambda: fabric.all_reduce(tensor, flight.flight, op=op))
        if small:
            return self._all_reduce_small(flight, tensor, op)
        work = flight.start(
            lambda: works_of(dist.all_reduce(tensor, op=kinds[op], group=self.group, async_op=True))
        )
        return Ticket([work], keepalive=(tensor,))

    def _all_reduce_small(self, flight: Departure, tensor: Tensor, op: str) -> Ticket:
        received = tensor.new_empty(self.world, tensor.numel())
        received[self.rank] = tensor.view(-1)
        parts = list(received)
        work = flight.start(lambda: self._routes.exchange([parts[self.rank]] * self.world, parts, flight.tag))

        def finish() -> None:
            flat = tensor.view(-1)
            if op == "max":
                torch.amax(received, dim=0, out=flat)
            else:
                sum_chunks(flat, parts, scale=1.0, accumulate=False)

        return Ticket([work], keepalive=(received,), finish=finish)

    def all_to_all(self, out: Tensor, src: Tensor, *, about: str = "") -> Ticket:
        sent = src.nbytes // self.world * (self.world - 1)
        flight = self._record("all_to_all", src, about, src.numel(), sent)
        if (fabric := self._fabric_for(src)) is not None:
            return self._carry(flight, lambda: fabric.all_to_all(out, src, flight.flight))
        work = flight.start(lambda: self._all_to_all(out, src, flight.tag))
        return Ticket([work], keepalive=(out, src))

    def _all_to_all(self, out: Tensor, src: Tensor, tag: int) -> list[Waitable]:
        if self._native:
            return works_of(dist.all_to_all_single(out, src, group=self.group, async_op=True))
        sent, received = list(src.view(self.world, -1)), list(out.view(self.world, -1))
        received[self.rank].copy_(sent[self.rank])
        return self._routes.exchange(sent, received, tag)

    def broadcast(self, tensor: Tensor, *, root: int = 0, about: str = "") -> Ticket:
        direct = not self._native and self.world <= _SMALL_WORLD
        copies = self.world - 1 if direct else 1
        flight = self._record(
            "broadcast", tensor, about, tensor.numel(), copies * tensor.nbytes if root == self.rank else 0
        )
        if (fabric := self._fabric_for(tensor)) is not None:
            return self._carry(flight, lambda: fabric.broadcast(tensor, flight.flight, root=root))

        def issue() -> list[Waitable]:
            if direct:
                return self._routes.send_from(root, tensor, flight.tag)
            return works_of(dist.broadcast(tensor, group_src=root, group=self.group, async_op=True))

        return Ticket([flight.start(issue)], keepalive=(tensor,))

    def _fabric_for(self, tensor: Tensor) -> Fabric | None:
        return self._fabric if tensor.device.type == "cpu" else None

    def _carry(self, departure: Departure, issue: Callable[[], Waitable]) -> Ticket:
        """The fabric keeps what it still needs of the tensors, and no more: see Fabric.allocate."""
        return Ticket([departure.start(lambda: [issue()])])

    def _record(self, op: str, tensor: Tensor, about: str, elements: int, sent_bytes: int) -> Departure:
        return self.log.depart(
            self.axis, self.lane, op, tensor, about=about, elements=elements, sent_bytes=sent_bytes
        )
