"""Tensors over memory that is partly the process's own and partly a file's, plain to read and write."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_HUGE = 2 << 20
_FIXED = 0x10  # MAP_FIXED of Linux: in place of what is mapped there
_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """`host_bytes` of memory followed by `file_bytes` of a file from `offset`, as one flat uint8 tensor.

    The tensor is ordinary memory to everyone: what is read of the file's part comes through the page cache,
    what is written there reaches the file. `forget` lets go of the pages that reading brought.

    [Note: two ways to one file] Hot paths read and write the file's part past the page cache (O_DIRECT) while
    nobody uses the tensor. Linux keeps both views equal then: a direct read first writes dirty pages out, a
    direct write drops the pages it made old. `tests/test_mapped.py` goes both ways in turn.
    """

    def __init__(self, host_bytes: int, file_bytes: int = 0, *, fd: int = -1, offset: int = 0) -> None:
        if host_bytes % PAGE and file_bytes:
            raise ValueError(f"host_bytes={host_bytes}: before a file's part allowed are multiples of {PAGE}")
        self.host_bytes, self.file_bytes = host_bytes, file_bytes
        self.nbytes = host_bytes + file_bytes
        libc = _libc()
        length = max(PAGE, -(-self.nbytes // PAGE) * PAGE)
        base = libc.mmap(None, length, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if base == _FAILED:
            raise _refused(f"mapping {length} bytes of memory")
        if file_bytes:
            fixed = libc.mmap(
                base + host_bytes, file_bytes, 3, mmap.MAP_SHARED | 0x10, fd, offset
            )  # MAP_FIXED
            if fixed == _FAILED:
                error = _refused(f"mapping {file_bytes} bytes of a file")
                libc.munmap(base, length)
                raise error
        elif host_bytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            libc.madvise(base, length, mmap.MADV_HUGEPAGE)
        # Every tensor over the mapping holds `memory`, and it goes with the last of them.
        self.memory = (ctypes.c_uint8 * max(1, self.nbytes)).from_address(base)
        weakref.finalize(self.memory, libc.munmap, base, length).atexit = False  # the kernel does it then
        self.base = base
        self.tensor: Tensor = torch.frombuffer(self.memory, dtype=torch.uint8)[: self.nbytes]

    def pin(self) -> bool:
        """Let a GPU copy to and from the host's part by itself. True when it took effect."""
        if not torch.cuda.is_available() or not self.host_bytes:
            return False
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(self.base, self.host_bytes, 0)) != 0:
            return False
        weakref.finalize(self.memory, runtime.cudaHostUnregister, self.base).atexit = False
        return True

    def show(self, fd: int, offset: int) -> None:
        """The file's part shows other bytes of a file from here on, at the same addresses."""
        base, libc = self.base + self.host_bytes, _libc()
        if libc.mmap(base, self.file_bytes, 3, mmap.MAP_SHARED | _FIXED, fd, offset) == _FAILED:
            raise _refused(f"mapping {self.file_bytes} bytes of a file")

    def forget(self) -> None:
        """The file's pages that are in memory go, written where they were dirty; they come back when read."""
        if self.file_bytes:
            _libc().madvise(self.base + self.host_bytes, self.file_bytes, mmap.MADV_DONTNEED)


def _refused(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
