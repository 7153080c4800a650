"""This rank's collectives in one group: shown to others when issued, finished in order when waited for."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ds_comm.shm_memory import Block, PeerSegment, Segment, process_start
from ds_core.ground.flight import Flight, Lane
from ds_kernels.shm import (
    FINISHED,
    ISSUED,
    MOVING,
    PARTS,
    SHARED,
    THERE,
    WHOLE,
    Call,
    ShmLibrary,
    addresses,
)

LOOK_NS = 50_000_000  # how often a wait looks whether the others live and the job goes on
_SPIN_NS = 50_000  # ranks come a few microseconds apart; after that the core is left to others
_MOVE_AFTER_NS = 100_000  # how long memory that its owner wants back is left where it is: at least this,
_MOVED_PER_NS = 8  # or what copying so many bytes takes, so that waiting never costs more than twice the best
_OUTSTANDING = 512  # collectives without a wait before the oldest is finished unasked; half of kRing

Places = ctypes.Array[ctypes.c_uint64]  # where each rank's bytes are


class Shows(Enum):
    """What a rank shows of its tensor."""

    WHOLE = "every peer reads all of it"
    PARTS = "every rank reads one part"
    SUM = "all write the sum over it: finishing needs nobody's memory any more"
    COPY = "every peer reads all of a copy, for this rank writes over its own"


@dataclass(slots=True)
class Peer:
    """Another rank: its number in the job, its process, and its memory here."""

    rank: int
    pid: int
    start: str
    segment: PeerSegment


@dataclass(slots=True, eq=False)
class Op:
    """One collective of this rank. `tensors` keeps alive what it reads and writes."""

    flow: Flow
    flight: Flight
    number: int
    own: int  # address of what this rank adds
    shown: int  # address of what others read
    part_bytes: int
    read: Callable[[Op, Places], None]
    tensors: tuple[Tensor, ...]
    lent: Block | None = None  # the caller's own memory, which others read; it may want to write there
    done: bool = False

    def wait(self) -> None:
        self.flow.finish(self)


class Flow:
    """Collectives are numbered from 1, alike on all ranks. [Note: half a ring]

    Issuing one waits for nobody: its bytes lie in this rank's segment until all peers have read them. Who
    issues n has finished n - 512, so no peer is 1024 behind, and a board of 1024 entries is enough.
    Finishing happens on the thread that waits, the oldest first.
    """

    def __init__(
        self, library: ShmLibrary, segment: Segment, peers: Sequence[Peer], lane: Lane, timeout_s: float
    ) -> None:
        self.library, self.lane, self._segment, self._timeout_s = library, lane, segment, timeout_s
        self.world = len(lane.ranks)
        others = {lane.ranks.index(peer.rank): peer for peer in peers}
        (self.rank,) = set(range(self.world)) - set(others)
        order = [(self.rank + step) % self.world for step in range(1, self.world)]
        self.others = [(r, others[r]) for r in order]  # each begins with another one
        self._bases = addresses(
            [others[r].segment.address if r in others else segment.address for r in range(self.world)]
        )
        self.places = addresses([0] * self.world)
        where = ctypes.addressof(self._bases)
        self.call = Call(
            boards=where, segments=where, places=ctypes.addressof(self.places),
            world=self.world, rank=self.rank, isa=library.isa_code,
        )  # fmt: skip
        self._spin_ns = _SPIN_NS if self.world <= len(os.sched_getaffinity(0)) else 0
        self._number = 0
        self._pending: deque[Op] = deque()
        self._issuing, self._finishing = threading.RLock(), threading.RLock()
        self._broken = ""
        self._pid = os.getpid()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel], uninitialised, that peers read in place; when it goes, it waits for the last reader."""
        with self._issuing:
            if self._broken or os.getpid() != self._pid:
                return torch.empty(numel, dtype=dtype)
            return self._segment.tensor(numel, dtype, self._read_by_all())

    def issue(
        self,
        flight: Flight,
        source: Tensor | None,
        read: Callable[[Op, Places], None],
        tensors: tuple[Tensor, ...],
        *,
        own: int,
        shows: Shows = Shows.WHOLE,
        also: int | None = None,
    ) -> Op:
        """Show the others this rank's bytes, where they are or elsewhere.

        `read` is called once all ranks have issued theirs. `also`: an address where `source` is wanted too.
        """
        with self._issuing:
            self.usable()
            while len(self._pending) >= _OUTSTANDING:  # See [Note: half a ring]
                self.finish(self._pending[0])
            number = self._number + 1
            size = 0 if source is None else source.nbytes
            kept = source is None or not size or shows is Shows.COPY
            lent = None if source is None or kept else self._segment.find(source.data_ptr())
            if source is not None and lent is not None:
                lent.last_use = number
                shown, layout = source.data_ptr(), SHARED
                tensors = tuple(tensor for tensor in tensors if shows is Shows.SUM or tensor is not source)
                if also is not None:
                    self.copy(also, shown, size)
            else:
                shown, layout = self._write_down(source, shows, number, also)
            part_bytes = size // self.world if shows is Shows.PARTS else 0
            op = Op(
                self,
                flight,
                number,
                own,
                shown,
                part_bytes,
                read,
                tensors,
                None if shows is Shows.SUM else lent,
            )
            mine = self._segment.address
            self.library.publish(mine, number, flight.tag, shown - mine, size, layout)
            self._number = number
            self._pending.append(op)
            return op

    def _write_down(
        self, source: Tensor | None, shows: Shows, number: int, also: int | None
    ) -> tuple[int, int]:
        """Copy what others read of `source`, so not this rank's own part: (address, layout)."""
        if source is None or not source.nbytes:
            return self._segment.address, WHOLE
        size, start = source.nbytes, source.data_ptr()
        part = size // self.world if shows is Shows.PARTS else 0
        block = self._segment.take(size - part, self._read_by_all())
        block.last_use = number
        self._segment.give(block)
        to, before = self._segment.address + block.start, self.rank * part
        if shows is not Shows.PARTS:
            self.copy(to, start, size, also=also)
            return to, WHOLE
        self.copy(to, start, before)
        self.copy(to + before, start + before + part, size - part - before)
        return to, PARTS

    def finish(self, op: Op) -> None:
        """Finish `op` and every earlier one. Raises: RuntimeError as `Fabric` says; DesyncError."""
        with self._finishing:
            while not op.done:
                self.usable()
                first = self._pending[0]
                try:
                    self._complete(first)
                except RuntimeError as error:
                    self._broken = self._broken or str(error)
                    raise
                first.done = True
                first.tensors = ()
                self._pending.popleft()
            if op.lent is not None and op.lent.held and not self._broken:
                self._take_back(op, op.lent)

    def _complete(self, op: Op) -> None:
        end = time.monotonic() + self._timeout_s
        library, call = self.library, self.call
        for r, peer in self.others:
            spin = self._spin_ns
            while status := library.await_(self._bases[r], op.number, spin, LOOK_NS):
                if status == 2:
                    raise RuntimeError(f"rank {peer.rank} has left before it came to {self._what(op)}")
                self.look(op, end, f"rank {peer.rank} did not come to", needed=ISSUED)
                spin = 0
        call.number, call.tag, call.part_bytes = op.number, op.flight.tag, op.part_bytes
        call.threads = torch.get_num_threads()
        self.places[self.rank] = op.own
        while (status := library.enter(ctypes.byref(call))) == MOVING:
            self.look(op, end, "a rank did not come to an end with the memory of")
        if status != THERE:
            other = self.lane.ranks[status]
            raise RuntimeError(f"rank {other} issued something else in place of {self._what(op)}")
        finished = False
        try:
            op.read(op, self.places)
            finished = True
        finally:
            library.leave(ctypes.byref(call), finished)

    def _take_back(self, op: Op, lent: Block) -> None:
        """The caller may now write to what peers have yet to read: leave them a copy."""
        op.lent = None
        patience = max(_MOVE_AFTER_NS, lent.nbytes // _MOVED_PER_NS)
        if self.library.await_readers(ctypes.byref(self.call), op.number, patience):
            return
        end = time.monotonic() + self._timeout_s
        block = self._segment.take(lent.nbytes, self._read_by_all())
        block.last_use = op.number
        self._segment.give(block)
        while self.library.withdraw(ctypes.byref(self.call), op.number, block.start, LOOK_NS):
            self.look(op, end, "a rank did not come to an end with")

    def look(self, op: Op, end: float, late: str, needed: int = FINISHED) -> None:
        """Does it make sense to go on waiting, until the others have at least issued or `FINISHED` it?

        Raises: RuntimeError, DesyncError.
        """
        self.lane.check()
        self.usable()
        waited = [p for r, p in self.others if self.library.standing(self._bases[r], op.number) < needed]
        dead = [f"rank {p.rank} (process {p.pid})" for p in waited if process_start(p.pid) != p.start]
        if dead:
            raise RuntimeError(f"{', '.join(sorted(dead))} died during {self._what(op)}")
        if time.monotonic() > end:
            raise RuntimeError(f"{late} {self._what(op)} within {self._timeout_s:g} s")

    def until(self) -> float:
        """When a wait that begins now has lasted too long."""
        return time.monotonic() + self._timeout_s

    def usable(self) -> None:
        """Raises: RuntimeError in a forked child, and after an error."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this process was forked from the rank that made {self.lane.name}, and collectives are "
                "that one's: leave them to the parent, or start this process anew and build a mesh in it"
            )
        if self._broken:
            raise RuntimeError(self._broken)

    def copy(self, to: int, source: int, size: int, *, also: int | None = None) -> None:
        """`size` bytes to one place, or to two at once."""
        if size:
            self.library.copy(to, also, source, size, torch.get_num_threads())

    def close(self) -> None:
        """Peers keep what was issued, and tensors their memory; what is waited for now raises."""
        self._broken = self._broken or f"the ranks of {self.lane.name} have left each other"
        if self._pid == os.getpid():
            self.library.close(self._segment.address)
        with self._issuing, self._finishing:
            self._pending.clear()
            for _, peer in self.others:
                peer.segment.close()

    def _what(self, op: Op) -> str:
        return f"collective {op.flight.number} of {self.lane.name}: {op.flight}"

    def _read_by_all(self) -> int:
        number: int = self.library.read_by_all(ctypes.addressof(self._bases), self.world)
        return number
