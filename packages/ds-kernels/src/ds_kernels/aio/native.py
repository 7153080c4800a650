"""The engines in C++: io_uring, Linux native aio, and threads with plain system calls."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
import weakref
from functools import cache

from ds_kernels.aio.job import Closed, Job, Settings, Table
from ds_kernels.library import open_library

KINDS = {"io_uring": 0, "libaio": 1, "threads": 2}
_OPS = {"read": 0, "write": 1, "sync": 2}
_ABI = 1
_AT_ONCE = 64  # completions collected by one call
_PATIENCE_MS = 200  # a submission that waits looks this often whether a signal came


class _Config(ctypes.Structure):
    _fields_ = (
        ("block_bytes", ctypes.c_int64),
        ("limit_bytes", ctypes.c_int64),
        ("engine", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("direct_fd", ctypes.c_int32),
        ("buffered_fd", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("durable", ctypes.c_int32),
        ("accepted", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Done(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int64),
        ("got", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@cache
def load_aio() -> ctypes.CDLL:
    """The library, with its signatures. Raises: BuildError."""
    found = open_library("aio")
    library = found.handle
    if library.ds_aio_abi() != _ABI:
        raise RuntimeError(f"{found.path} has ABI {library.ds_aio_abi()}, {_ABI} is wanted: delete it")
    handle = ctypes.c_void_p
    library.ds_aio_open.argtypes = (ctypes.POINTER(_Config), ctypes.POINTER(handle))
    library.ds_aio_submit.argtypes = (handle, ctypes.POINTER(_Request), ctypes.c_int)
    library.ds_aio_cancel.argtypes = (handle, ctypes.c_int64)
    library.ds_aio_wait.argtypes = (handle, ctypes.POINTER(_Done), ctypes.c_int, ctypes.c_int)
    library.ds_aio_stop.argtypes = (handle, ctypes.c_int)
    library.ds_aio_reserve.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    for name in ("join", "free"):
        getattr(library, f"ds_aio_{name}").argtypes = (handle,)
    for name in ("stop", "join", "free"):
        getattr(library, f"ds_aio_{name}").restype = None
    return library


@cache
def probe(name: str) -> int:
    """0 if the engine can be had here, else errno. Raises: BuildError."""
    return int(load_aio().ds_aio_probe(KINDS[name]))


class NativeEngine:
    """One queue and its threads in C++, and one Python thread that collects what is done.

    Raises: OSError if the system does not give what the engine needs; BuildError.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.table = name, Table()
        self.threads = settings.threads or (min(settings.queue_depth, 8) if name == "threads" else 1)
        self._library, self._pid = load_aio(), os.getpid()
        self._least = settings.block_size
        self._idents = itertools.count(1)
        self._handle = ctypes.c_void_p()
        config = _Config(
            block_bytes=settings.block_size,
            limit_bytes=settings.max_pending_bytes,
            engine=KINDS[name],
            threads=self.threads,
            depth=settings.queue_depth // self.threads if name != "threads" else 1,
        )
        error = self._library.ds_aio_open(ctypes.byref(config), ctypes.byref(self._handle))
        if error:
            raise OSError(error, os.strerror(error))
        # Freed with this object and not before: another thread may still be inside a call.
        weakref.finalize(self, _free, self._library, self._handle, self._pid).atexit = False
        self._collector = threading.Thread(target=self._collect, name="ds-aio", daemon=True)
        self._collector.start()

    def submit(self, job: Job) -> None:
        """Accept the job; waits while too many bytes are pending. Raises: Closed."""
        ident, call, handle = next(self._idents), self._library, self._handle
        if job.op == "write":
            error = call.ds_aio_reserve(job.file.buffered_fd, job.offset, job.wanted, self._least)
            if error:
                return self.table.tell(job.future, job.outcome(error, 0))
        request = _Request(
            id=ident,
            data=job.address,
            bytes=job.wanted,
            offset=job.offset,
            direct_fd=job.file.direct_fd,
            buffered_fd=job.file.buffered_fd,
            op=_OPS[job.op],
            durable=job.durable,
        )
        self.table.jobs[ident] = job
        job.future.allow_cancel(lambda: self._take_back(ident))
        error = errno.EAGAIN
        try:
            while error == errno.EAGAIN:
                error = call.ds_aio_submit(handle, ctypes.byref(request), _PATIENCE_MS)
        finally:  # not `if error`: a Ctrl-C may come between the call and what it returns
            if not request.accepted:
                del self.table.jobs[ident]
                job.file.release()
        if error == errno.ENOMEM:
            raise MemoryError("no memory for a request")
        if error:
            raise Closed

    def stop(self, *, drop: bool) -> None:
        """Accept no more; with `drop`, hand no further block to the system."""
        self._library.ds_aio_stop(self._handle, drop)

    def join(self) -> None:
        """After `stop`: wait until all is done and let resources go."""
        if threading.current_thread() is not self._collector:
            self._collector.join()

    def _take_back(self, ident: int) -> bool:
        if not self._library.ds_aio_cancel(self._handle, ident):
            return False
        self.table.jobs.pop(ident).file.release()
        return True

    def _collect(self) -> None:
        done = (_Done * _AT_ONCE)()
        while (count := self._library.ds_aio_wait(self._handle, done, _AT_ONCE, -1)) >= 0:
            for one in done[:count]:
                self.table.settle(one.id, one.error, one.got)
        self._library.ds_aio_join(self._handle)


def _free(library: ctypes.CDLL, handle: ctypes.c_void_p, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the memory and not the threads
        library.ds_aio_free(handle)
