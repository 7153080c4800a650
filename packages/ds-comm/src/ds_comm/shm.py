"""Ranks of one host through shared memory: each shows its bytes once, and the others read them in place."""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ds_comm.shm_flow import LOOK_NS, Flow, Op, Peer, Places, Shows
from ds_comm.shm_memory import PeerSegment, Segment, host_name, process_start
from ds_core.ground.collectives import sum_chunks
from ds_core.ground.flight import Flight, Lane
from ds_kernels.build import BuildError, source_key
from ds_kernels.native import DTYPES, code
from ds_kernels.shm import MAX_RANKS, THERE, load_shm

_TOGETHER_BYTES = 1 << 18  # from here on three ranks and more share the sums of an all-reduce
_BLOCK = 1 << 18  # elements that are summed before they are added: they stay in the cache
_log = logging.getLogger("ds_comm")


class ShmFabric:
    """The collectives of one group whose ranks share a host; `connect` makes it.

    A tensor from `allocate` is read where it is; any other is copied once, when its collective is issued.
    Finishing happens on the thread that waits, oldest collective first. Sums are in rank order and in the
    output's dtype. Not usable after a fork: the child gets a RuntimeError.
    """

    name = "shared memory"

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.rank, self.world = flow.rank, flow.world

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._flow.allocate(numel, dtype)

    def close(self) -> None:
        self._flow.close()

    def all_gather(self, out: Tensor, shard: Tensor, flight: Flight) -> Op:
        base, size = _address(out), shard.nbytes
        own = base + self.rank * size
        also = None if _address(shard) == own else own
        return self._flow.issue(flight, shard, self._fill(base, size), (out,), own=own, also=also)

    def all_to_all(self, out: Tensor, src: Tensor, flight: Flight) -> Op:
        base, size = _address(out), src.nbytes // self.world
        own = _address(src) + self.rank * size
        self._flow.copy(base + self.rank * size, own, size)
        return self._flow.issue(flight, src, self._fill(base, size), (out,), own=own, shows=Shows.PARTS)

    def broadcast(self, tensor: Tensor, flight: Flight, *, root: int) -> Op:
        base, size = _address(tensor), tensor.nbytes

        def read(op: Op, places: Places) -> None:
            if root != self.rank:
                self._flow.copy(base, places[root], size)

        source = tensor if root == self.rank else None
        return self._flow.issue(flight, source, read, (tensor,), own=base)

    def reduce_scatter(
        self, out: Tensor, full: Tensor, flight: Flight, *, scale: float, accumulate: bool
    ) -> Op:
        own = _address(full) + self.rank * (full.nbytes // self.world)
        _address(out)
        dtype = full.dtype

        def read(op: Op, places: Places) -> None:
            if not {dtype, out.dtype} <= set(DTYPES):
                found = [_tensor_at(place, dtype, out.numel()) for place in places]
                sum_chunks(out, found, scale=scale, accumulate=accumulate)
            elif accumulate:
                self._add(out, dtype, scale)
            else:
                self._sum(out.data_ptr(), out.dtype, dtype, (0, out.numel()), scale)
                _written(out)

        return self._flow.issue(flight, full, read, (out, full), own=own, shows=Shows.PARTS)

    def all_reduce(self, tensor: Tensor, flight: Flight, *, op: str) -> Op:
        base, dtype = _address(tensor), tensor.dtype
        if op == "max" or dtype not in DTYPES:
            return self._all_reduce_any(tensor, flight, op)

        def read(op: Op, places: Places) -> None:
            if self._flow.call.shared or (self.world > 2 and tensor.nbytes >= _TOGETHER_BYTES):
                self._sum_together(op, dtype, tensor.numel())
            else:
                self._sum(base, dtype, dtype, (0, tensor.numel()))
            _written(tensor)

        return self._flow.issue(flight, tensor, read, (tensor,), own=base, shows=Shows.SUM)

    def _all_reduce_any(self, tensor: Tensor, flight: Flight, kind: str) -> Op:
        """Maxima, and sums of what only torch can add."""
        flat = tensor.view(-1)

        def read(op: Op, places: Places) -> None:
            found = [_tensor_at(place, flat.dtype, flat.numel()) for place in places]
            found[self.rank] = flat.clone()
            if kind == "max":
                torch.amax(torch.stack(found), dim=0, out=flat)
            else:
                sum_chunks(flat, found, scale=1.0, accumulate=False)

        return self._flow.issue(flight, tensor, read, (tensor,), own=flat.data_ptr(), shows=Shows.COPY)

    def _fill(self, base: int, size: int) -> Callable[[Op, Places], None]:
        """`size` bytes from each of the others, to where that rank's come in what begins at `base`."""

        def read(op: Op, places: Places) -> None:
            for r, _ in self._flow.others:
                self._flow.copy(base + r * size, places[r], size)

        return read

    def _sum(
        self, out: int, dtype: torch.dtype, source: torch.dtype, span: tuple[int, int], scale: float = 1.0
    ) -> None:
        """Elements `span` of the sum over ranks; `out` is where the output's element 0 would be."""
        if span[0] < span[1]:
            call = ctypes.byref(self._flow.call)
            status = self._flow.library.sum(call, out, code(dtype), code(source), *span, scale)
            assert status == 0, status

    def _add(self, out: Tensor, source: torch.dtype, scale: float) -> None:
        """out += scale * sum; the last step is torch's, which fuses it on some processors only."""
        total = torch.empty(min(out.numel(), _BLOCK), dtype=out.dtype)
        for start in range(0, out.numel(), _BLOCK):
            end = min(start + _BLOCK, out.numel())
            self._sum(total.data_ptr() - start * out.dtype.itemsize, out.dtype, source, (start, end))
            out[start:end].add_(total[: end - start], alpha=scale)

    def _sum_together(self, op: Op, dtype: torch.dtype, numel: int) -> None:
        """Each piece is summed by one rank, whichever is free, into every rank's memory."""
        flow, pieces = self._flow, ctypes.c_int64()
        flow.places[self.rank] = op.shown
        end, call, count = flow.until(), ctypes.byref(flow.call), ctypes.byref(pieces)
        while (status := flow.library.all_reduce(call, code(dtype), numel, LOOK_NS, count)) != THERE:
            assert status < 0, status
            flow.look(op, end, "a rank did not come to an end with")
        if op.shown != op.own:
            flow.copy(op.own, op.shown, numel * dtype.itemsize)


def connect(
    *, lane: Lane, rank: int, tell: Callable[[bytes], list[bytes]], timeout_s: float
) -> ShmFabric | None:
    """Shared memory for the ranks of `lane`, if they are on one host and each can map the others.

    Collective: `tell` is called once, and a second time if nobody's first message was empty.
    """
    problem = message = ""
    try:
        if len(lane.ranks) > MAX_RANKS:
            raise OSError(f"the group has {len(lane.ranks)} ranks, and at most {MAX_RANKS} can share memory")
        library = load_shm()
        segment = Segment(library.board_bytes)
        message = json.dumps(_offer(segment))
    except (OSError, BuildError, AttributeError) as error:  # AttributeError: a system without memfd
        problem = str(error)
    told = tell(message.encode())
    if problem:
        _log.warning("%s goes by sockets, not by shared memory: %s", lane.name, problem)
    if not all(told):
        return None
    peers, offers = [], [json.loads(each) for each in told]
    try:
        for place, (other, its) in enumerate(zip(lane.ranks, offers, strict=True)):
            if any(its[key] != offers[rank][key] for key in ("host", "kind")):
                raise OSError(f"rank {other} is on another host, or of another version")
            if place != rank:
                mapped = PeerSegment(its["pid"], its["file"], its["bytes"], bytes.fromhex(its["name"]))
                peers.append(Peer(other, its["pid"], its["start"], mapped))
    except OSError as error:
        problem = str(error)
    if all(answer == b"yes" for answer in tell(b"no" if problem else b"yes")):
        return ShmFabric(Flow(library, segment, peers, lane, timeout_s))
    for peer in peers:
        peer.segment.close()
    _log.info("%s goes by sockets, not by shared memory: %s", lane.name, problem or "a rank cannot map it")
    return None


def _offer(segment: Segment) -> dict[str, str | int]:
    pid = os.getpid()
    return {
        "host": host_name(), "kind": source_key("shm"), "pid": pid, "start": process_start(pid),
        "file": segment.file, "bytes": segment.nbytes, "name": segment.name.hex(),
    }  # fmt: skip


def _address(tensor: Tensor) -> int:
    """Where its bytes are. Raises: ValueError unless they are in a row."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a collective needs a contiguous tensor, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}: call contiguous() first"
        )
    return tensor.data_ptr()


def _tensor_at(place: int, dtype: torch.dtype, numel: int) -> Tensor:
    """Memory of any rank as a tensor [numel]."""
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (numel * dtype.itemsize)).from_address(place), dtype=dtype)


def _written(tensor: Tensor) -> None:
    """Tell autograd, as torch's own sums would."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
