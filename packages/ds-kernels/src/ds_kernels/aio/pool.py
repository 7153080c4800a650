"""Slabs of page-aligned memory, locked where the system allows it: what O_DIRECT takes without a copy."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20


class AlignedPool:
    """`slabs` equal pieces of one mapping, lent out as flat tensors.

    `locked` says whether the memory is locked (mlock) and so never paged out, `why` why not. It lives as long
    as the pool or any tensor of it.
    """

    def __init__(self, slab_bytes: int, slabs: int, *, lock: bool = True) -> None:
        for name, value in (("slab_bytes", slab_bytes), ("slabs", slabs)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed are whole numbers from 1")
        self.slab_bytes = -(-slab_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slabs = slabs
        self.locked, self.why = False, "not asked for"
        memory = _mapped(self.slab_bytes * slabs)
        if lock:
            self.locked, self.why = _locked(memory)
        if not self.locked:
            memory.zero_()  # pages are there before the first request needs them
        self._memory = memory
        self._lock = threading.Lock()
        self._free = list(range(slabs))[::-1]

    @property
    def free(self) -> int:
        """Slabs that can be leased now."""
        return len(self._free)

    def lease(self, numel: int | None = None, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A slab as a flat tensor of `numel` elements, or of as many as fit; what it holds is arbitrary.

        Raises: ValueError if a slab is too small; RuntimeError if none is free.
        """
        most = self.slab_bytes // dtype.itemsize
        if numel is not None and not 1 <= numel <= most:
            raise ValueError(f"numel={numel}: a slab of {self.slab_bytes} bytes holds 1 to {most} of {dtype}")
        with self._lock:
            if not self._free:
                raise RuntimeError(f"all {self.slabs} slabs are leased: release one, or make the pool larger")
            slab = self._free.pop()
        begin = slab * self.slab_bytes
        taken = most if numel is None else numel
        return self._memory[begin : begin + taken * dtype.itemsize].view(dtype)

    def release(self, tensor: Tensor) -> None:
        """Take back a leased slab; requests on it must be done.

        Raises: ValueError if it is not out on lease.
        """
        slab, rest = divmod(tensor.data_ptr() - self._memory.data_ptr(), self.slab_bytes)
        with self._lock:
            if rest or not 0 <= slab < self.slabs or slab in self._free:
                raise ValueError("tensor: not a slab that this pool has out on lease")
            self._free.append(slab)


def _mapped(num_bytes: int) -> Tensor:
    """Pages of our own, large ones where the system has them; freed with the last tensor over them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, num_bytes + _LARGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % _LARGE_PAGE
    return whole[begin : begin + num_bytes]


def _locked(memory: Tensor) -> tuple[bool, str]:
    lock = getattr(ctypes.CDLL(None, use_errno=True), "mlock", None)
    if lock is None:
        return False, "this system has no mlock"
    if lock(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)) == 0:
        return True, "locked"
    return False, f"mlock: {os.strerror(ctypes.get_errno())}; raise `ulimit -l`"
