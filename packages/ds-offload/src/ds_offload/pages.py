"""Two ranges of memory change places without a byte being copied."""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE = mmap.PAGESIZE
_MOVE = 3  # MREMAP_MAYMOVE | MREMAP_FIXED of Linux
_FAILED = ctypes.c_void_p(-1).value


def swap_pages(one: int, two: int, nbytes: int) -> bool:
    """Swap what is at two addresses, in whole pages of private memory; False, with nothing changed, where
    the system cannot, or an address is no page's.

    The page tables move, so it costs microseconds. For their length nothing is mapped at the addresses:
    nobody else may look. Memory that a GPU knows by its pages (pinned) must not be given.
    Raises OSError when the system refuses half way and takes back what it did.
    """
    if one % PAGE or two % PAGE or nbytes <= 0:
        return False
    libc = _libc()
    length = -(-nbytes // PAGE) * PAGE
    aside = libc.mmap(None, length, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if aside == _FAILED:
        return False
    if libc.mremap(one, length, length, _MOVE, aside) == _FAILED:
        libc.munmap(aside, length)
        return False
    if libc.mremap(two, length, length, _MOVE, one) == _FAILED:
        code = ctypes.get_errno()
        libc.mremap(aside, length, length, _MOVE, one)
        raise OSError(code, f"moving {length} bytes of memory: {os.strerror(code)}")
    if libc.mremap(aside, length, length, _MOVE, two) == _FAILED:
        code = ctypes.get_errno()
        libc.mremap(one, length, length, _MOVE, two)
        libc.mremap(aside, length, length, _MOVE, one)
        raise OSError(code, f"moving {length} bytes of memory: {os.strerror(code)}")
    return True


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    libc.mremap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
