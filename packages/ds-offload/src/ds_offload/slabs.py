"""Page-aligned host memory by the piece: what a disk reads into without a copy, used again when let go."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ds_offload.mapped import PAGE, Mapping


class Slabs:
    """Lends flat uint8 tensors; a slab is free again when the last tensor over its memory is gone.

    Nobody gives a slab back by hand: autograd decides how long it needs what it saved. At most `keep_bytes`
    of free memory stay for the next lease of the same size; the rest goes back to the system.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._free: dict[int, list[Mapping]] = {}
        self._free_bytes = 0
        # Filled by finalizers, which may run anywhere, in this class's own lines too: an append and no more.
        self._returned: deque[Mapping] = deque()
        self._out = 0
        self.peak_bytes = 0  # leased at one time

    @property
    def leased_bytes(self) -> int:
        """Bytes of slabs over which a tensor lives."""
        self._collect()
        return self._out

    @property
    def free_bytes(self) -> int:
        """Bytes kept for the next lease."""
        self._collect()
        return self._free_bytes

    def lease(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 that begins on a page; what it holds is arbitrary. Raises: OSError."""
        self._collect()
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        kept = self._free.get(size)
        if kept:
            mapping = kept.pop()
            self._free_bytes -= size
        else:
            mapping = Mapping(size)
        self._out += size
        self.peak_bytes = max(self.peak_bytes, self._out)
        memory = (ctypes.c_uint8 * size).from_address(mapping.base)
        # The storage of the tensor holds `memory`, and nothing else does: its end is the end of the lease.
        weakref.finalize(memory, _append, self._returned.append, mapping).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    def _collect(self) -> None:
        while self._returned:
            mapping = self._returned.popleft()
            self._out -= mapping.nbytes
            if self._free_bytes + mapping.nbytes <= self._keep_bytes:
                self._free.setdefault(mapping.nbytes, []).append(mapping)
                self._free_bytes += mapping.nbytes


def _append(append: Callable[[Mapping], None], mapping: Mapping) -> None:
    append(mapping)
