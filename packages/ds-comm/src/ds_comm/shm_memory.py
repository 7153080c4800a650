"""Memory that ranks of one host see of each other: this rank's segment, its blocks, and the others' segments.

A segment has no name: it is a memfd, which a peer opens through /proc while the group is made and which the
kernel frees with the last process that maps it, however that process ends. Nothing is ever in /dev/shm.
"""

from __future__ import annotations

import bisect
import ctypes
import ctypes.util
import mmap
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
NAME_BYTES = 16
_ROOM_BYTES = 64 << 30  # of addresses, for each segment; pages come when they are used
_KEPT_BYTES = 256 << 20  # of pages at the segment's end that nobody uses; what is more goes back
_PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> Any:
    found = ctypes.CDLL(None, use_errno=True)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    )
    found.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    found.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return found


def process_start(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where there is none, or only its remains."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def host_name() -> str:
    """The same for processes that see each other's /proc and have one network, and only for these.

    Ranks in network namespaces of their own were put on different hosts on purpose, in containers or to try a
    slow network out.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
        return "/".join([file.read().strip(), *spaces])


@dataclass(slots=True, eq=False)
class Block:
    """A part of the segment. It is given to someone else once nobody here holds it and every peer is done
    with the collective `last_use`."""

    start: int
    nbytes: int
    last_use: int = 0
    held: bool = True  # by a tensor


class Segment:
    """This rank's memory: a board that others read, then blocks.

    Raises: OSError when the system gives no such memory.
    """

    def __init__(self, board_bytes: int) -> None:
        self.file = os.memfd_create("ds-shm", os.MFD_CLOEXEC)
        try:
            first = -(-board_bytes // PAGE) * PAGE
            memory = os.sysconf("SC_PHYS_PAGES") * PAGE
            self.nbytes = first + min(_ROOM_BYTES, -(-memory // PAGE) * PAGE)
            os.ftruncate(self.file, self.nbytes)
            os.posix_fallocate(self.file, 0, first)
            self._map = mmap.mmap(self.file, self.nbytes)
        except BaseException:
            os.close(self.file)
            raise
        weakref.finalize(self, os.close, self.file)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.name = os.urandom(NAME_BYTES)
        self._map[:NAME_BYTES] = self.name
        self._top = first  # what lies before has pages
        self._free: list[tuple[int, int]] = []  # (start, end), in order
        self._held: dict[int, Block] = {}  # blocks that tensors have, by start
        self._starts: list[int] = []
        self._dropped: deque[Block] = deque()  # filled by finalizers, which run anywhere
        self._leaving: list[Block] = []
        self._lock = threading.Lock()

    def tensor(self, numel: int, dtype: torch.dtype, read_by_all: int) -> Tensor:
        """An uninitialised tensor [numel] that peers can read in place."""
        if not numel:
            return torch.empty(0, dtype=dtype)
        block = self.take(numel * dtype.itemsize, read_by_all)
        block.held = True
        with self._lock:
            self._held[block.start] = block
            bisect.insort(self._starts, block.start)
        memory = (ctypes.c_char * (numel * dtype.itemsize)).from_buffer(self._map, block.start)
        weakref.finalize(memory, self._drop, block).atexit = False
        return torch.frombuffer(memory, dtype=dtype, count=numel)

    def take(self, nbytes: int, read_by_all: int) -> Block:
        """A block that no tensor holds. Raises: OSError when there is no memory."""
        need = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            self._reap(read_by_all)
            fits = [(end - start, start) for start, end in self._free if end - start >= need]
            if fits:
                size, start = min(fits)
                self._free.remove((start, start + size))
                if size > need:
                    bisect.insort(self._free, (start + need, start + size))
                return Block(start, nbytes, held=False)
            start = self._top
            if self._free and self._free[-1][1] == start:
                start = self._free[-1][0]
            if start + need > self.nbytes:
                raise OSError(
                    f"{nbytes} bytes of shared memory are wanted, {self.nbytes - start} of {self.nbytes} "
                    "are left: wait for tickets sooner, or set DS_SHM=0"
                )
            os.posix_fallocate(self.file, self._top, start + need - self._top)
            if start < self._top:
                self._free.pop()
            self._top = start + need
            return Block(start, nbytes, held=False)

    def give(self, block: Block) -> None:
        """The block is free once its last use is read by all."""
        with self._lock:
            self._leaving.append(block)

    def find(self, address: int) -> Block | None:
        """The block of the tensor that has this address, if one has."""
        at = address - self.address
        with self._lock:
            place = bisect.bisect_right(self._starts, at)
            block = self._held[self._starts[place - 1]] if place else None
        return block if block is not None and at < block.start + block.nbytes else None

    def _drop(self, block: Block) -> None:
        block.held = False
        self._dropped.append(block)

    def _reap(self, read_by_all: int) -> None:
        while self._dropped:
            block = self._dropped.popleft()
            del self._held[block.start]
            self._starts.remove(block.start)
            self._leaving.append(block)
        staying = []
        for block in self._leaving:
            if block.last_use > read_by_all:
                staying.append(block)
            else:
                self._release(block.start, block.start + max(PAGE, -(-block.nbytes // PAGE) * PAGE))
        self._leaving = staying

    def _release(self, start: int, end: int) -> None:
        """Join with free neighbours; pages at the segment's end go back when they are many."""
        place = bisect.bisect(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
        if end == self._top and end - start > _KEPT_BYTES:
            keep = start + _KEPT_BYTES
            if not _libc().fallocate(self.file, _PUNCH, keep, end - keep):
                self._top = end = keep
        bisect.insort(self._free, (start, end))


class PeerSegment:
    """Another rank's segment, mapped here. Raises: OSError when it is not there, or not what was told."""

    def __init__(self, pid: int, file: int, nbytes: int, name: bytes) -> None:
        opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.fstat(opened).st_size != nbytes or os.pread(opened, len(name), 0) != name:
                raise OSError(f"process {pid} is not the rank that it should be")
            both = mmap.PROT_READ | mmap.PROT_WRITE
            address = _libc().mmap(None, nbytes, both, mmap.MAP_SHARED, opened, 0)
        finally:
            os.close(opened)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)}: mapping {nbytes} bytes of process {pid}")
        self.address: int = address
        self._unmap = weakref.finalize(self, _libc().munmap, address, nbytes)
        self._unmap.atexit = False  # another thread may still read

    def close(self) -> None:
        self._unmap()
