"""Shared memory of the ranks of one host: the calls of kernels/shm, by address (for ds_comm.shm)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from ds_kernels.library import open_library
from ds_kernels.native import Native, Options

MAX_RANKS = 64
WHOLE, PARTS, SHARED = range(3)  # how a rank's bytes lie, as kernels/shm/board.h has them
MOVING = -2  # of `enter`: a peer moves its bytes, come again
ISSUED, FINISHED = 1, 2  # of `standing`
THERE = -1  # of `enter` and `all_reduce`

_long, _int, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Call(ctypes.Structure):
    """One collective as one rank sees it; board.h says what the fields are."""

    _fields_ = (
        ("boards", _pointer),
        ("segments", _pointer),
        ("places", _pointer),
        ("number", ctypes.c_uint64),
        ("part_bytes", _long),
        ("tag", ctypes.c_uint32),
        ("world", _int),
        ("rank", _int),
        ("threads", _int),
        ("isa", _int),
        ("shared", _int),
    )


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "board_bytes": (_long, ()),
    "publish": (
        None,
        (_pointer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32),
    ),
    "await": (_int, (_pointer, ctypes.c_uint64, _long, _long)),
    "standing": (_int, (_pointer, ctypes.c_uint64)),
    "enter": (_int, (_pointer,)),
    "leave": (None, (_pointer, _int)),
    "read_by_all": (ctypes.c_uint64, (_pointer, _int)),
    "close": (None, (_pointer,)),
    "await_readers": (_int, (_pointer, ctypes.c_uint64, _long)),
    "withdraw": (_int, (_pointer, ctypes.c_uint64, ctypes.c_uint64, _long)),
    "copy": (None, (_pointer, _pointer, _pointer, _long, _int)),
    "sum": (_int, (_pointer, _pointer, _int, _int, _long, _long, ctypes.c_float)),
    "all_reduce": (_int, (_pointer, _int, _long, _long, _pointer)),
}


class ShmLibrary:
    """The loaded library: `call.publish(...)` and the others of board.h, without the interpreter's lock.

    Raises: BuildError if it cannot be had.
    """

    def __init__(self) -> None:
        native = Native(open_library("shm").handle, Options.from_environment())
        self.isa_code = native.isa_code
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(native.handle, f"ds_shm_{name}")
            function.restype, function.argtypes = result, list(arguments)
        call = native.handle
        self.board_bytes: int = call.ds_shm_board_bytes()
        self.publish, self.await_ = call.ds_shm_publish, call.ds_shm_await
        self.enter, self.leave, self.close = call.ds_shm_enter, call.ds_shm_leave, call.ds_shm_close
        self.withdraw, self.read_by_all = call.ds_shm_withdraw, call.ds_shm_read_by_all
        self.await_readers, self.standing = call.ds_shm_await_readers, call.ds_shm_standing
        self.copy, self.sum, self.all_reduce = call.ds_shm_copy, call.ds_shm_sum, call.ds_shm_all_reduce


@cache
def load_shm() -> ShmLibrary:
    """The library, loaded once in a process. Raises: BuildError."""
    return ShmLibrary()


def addresses(places: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    """An array of pointers; keep it while its buffer is in use."""
    return (ctypes.c_uint64 * len(places))(*places)
