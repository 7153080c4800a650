"""The engine without a compiler: Python threads and os.preadv; the reference of the others."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ds_kernels.aio.job import Closed, Job, Settings, Table

ALIGN = max(4096, mmap.PAGESIZE)


class PythonEngine:
    """A thread pool; each worker carries out one request, block by block."""

    name = "python"

    def __init__(self, settings: Settings) -> None:
        self.table = Table()
        self.threads = settings.threads or min(settings.queue_depth, 8)
        self._settings = settings
        self._idents = itertools.count(1)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="ds-aio")
        self._space = threading.Condition()
        self._pending_bytes = 0
        self._stopped = self._dropping = False

    def submit(self, job: Job) -> None:
        """Accept the job; waits while too many bytes are pending. Raises: Closed."""
        ident, limit = next(self._idents), self._settings.max_pending_bytes
        try:
            with self._space:
                self._space.wait_for(
                    lambda: (
                        self._stopped or not self._pending_bytes or self._pending_bytes + job.wanted <= limit
                    )
                )
                if self._stopped:
                    raise Closed
                self._pending_bytes += job.wanted
                self.table.jobs[ident] = job
                ticket = self._pool.submit(self._run, ident, job)
        except BaseException as error:
            self.table.jobs.pop(ident, None)
            job.file.release()
            if isinstance(error, RuntimeError):  # the interpreter is ending
                raise Closed from error
            raise
        job.future.allow_cancel(lambda: self._take_back(ident, ticket))

    def stop(self, *, drop: bool) -> None:
        """Accept no more; with `drop`, hand no further block to the system."""
        with self._space:
            self._stopped = True
            self._dropping = self._dropping or drop
            self._space.notify_all()

    def join(self) -> None:
        """After `stop`: wait until all is done and let resources go."""
        own = threading.current_thread().name.startswith("ds-aio")
        self._pool.shutdown(wait=not own)

    def _take_back(self, ident: int, ticket: Future[None]) -> bool:
        if not ticket.cancel():
            return False
        job = self.table.jobs.pop(ident)
        job.file.release()
        self._give_space(job)
        return True

    def _run(self, ident: int, job: Job) -> None:
        got, error = 0, 0
        try:
            for done in self._steps(job):
                got = done
                if self._dropping:
                    error = errno.ECANCELED
                    break
        except OSError as failed:
            error = failed.errno or errno.EIO
        self._give_space(job)
        self.table.settle(ident, error, got)

    def _give_space(self, job: Job) -> None:
        with self._space:
            self._pending_bytes -= job.wanted
            self._space.notify_all()

    def _steps(self, job: Job) -> Iterator[int]:
        """Carry the job out; gives after each block the bytes done so far, and ends early with the file."""
        fd, done = job.file.buffered_fd, 0
        if job.op == "sync":
            os.fsync(fd)
        memory = memoryview((ctypes.c_char * job.wanted).from_address(job.address)) if job.wanted else b""
        while done < job.wanted:
            took = self._block(job, memory[done:], done)
            if took == 0 and job.op == "write":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if took == 0:
                return
            done += took
            yield done
        if job.durable:
            os.fdatasync(fd)

    def _block(self, job: Job, memory: memoryview | bytes, done: int) -> int:
        """One system call; past the page cache where all is aligned."""
        offset, left, size = job.offset + done, len(memory), self._settings.block_size
        call = os.preadv if job.op == "read" else os.pwritev
        if job.file.direct and offset % ALIGN:
            return call(job.file.buffered_fd, [memory[: min(size, -offset % ALIGN)]], offset)
        if not job.file.direct or (job.address + done) % ALIGN or left < ALIGN:
            return call(job.file.buffered_fd, [memory[:size]], offset)
        try:
            return call(job.file.direct_fd, [memory[: min(size, left // ALIGN * ALIGN)]], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return call(job.file.buffered_fd, [memory[:size]], offset)
