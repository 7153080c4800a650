"""One request from its submission to its future's result, whichever engine carries it out."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from ds_kernels.aio.file import AioError, AioFile

Op = Literal["read", "write", "sync"]


class Closed(Exception):
    """The engine takes no more jobs."""


class AioFuture(Future[int]):
    """The bytes a request moved, once it is done: a concurrent.futures.Future.

    `cancel` takes a request back if no block of it was handed to the system, and else changes nothing.
    Callbacks run on the thread that collects completions: keep them short.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._outcome: int | BaseException | None = None
        self._take_back: Callable[[], bool] | None = None
        self.seen = False  # did anybody ask how it went?

    def cancel(self) -> bool:
        """Take the request back; False if it has begun."""
        take_back = self._take_back
        if os.getpid() != self._pid or self.done() or take_back is None or not take_back():
            return os.getpid() == self._pid and self.cancelled()
        self._take_back = None
        super().cancel()
        self.set_running_or_notify_cancel()
        return True

    def result(self, timeout: float | None = None) -> int:
        """The number of bytes. Raises: AioError; TimeoutError; CancelledError."""
        self.seen = True
        if os.getpid() == self._pid:
            return super().result(timeout)
        if isinstance(self._outcome, int):
            return self._outcome
        raise self._elsewhere()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None."""
        self.seen = True
        if os.getpid() == self._pid:
            return super().exception(timeout)
        return None if isinstance(self._outcome, int) else self._elsewhere()

    def settle(self, outcome: int | BaseException) -> None:
        """Give the result; called by the engine, once."""
        self._outcome, self._take_back = outcome, None
        if isinstance(outcome, int):
            self.set_result(outcome)
        else:
            self.set_exception(outcome)

    def allow_cancel(self, take_back: Callable[[], bool]) -> None:
        """`take_back` tells the engine to forget the request, and whether it did."""
        self._take_back = take_back

    def _elsewhere(self) -> BaseException:
        # No lock is touched here: another thread of the parent may have held it at the fork.
        return (
            self._outcome
            if isinstance(self._outcome, BaseException)
            else RuntimeError(
                f"this request belongs to process {self._pid}, before the fork: wait for it there"
            )
        )


@dataclass(slots=True, eq=False)
class Job:
    """What is to be done, what must stay alive meanwhile, and who is told."""

    op: Op
    file: AioFile
    memory: Tensor | None
    offset: int = 0
    durable: bool = False
    future: AioFuture = field(default_factory=AioFuture)

    @property
    def wanted(self) -> int:
        """Bytes."""
        return 0 if self.memory is None else self.memory.nbytes

    @property
    def address(self) -> int:
        """Of the first byte in memory."""
        return 0 if self.memory is None else self.memory.data_ptr()

    def outcome(self, error: int, got: int) -> int | AioError:
        """What the engine found, as a result or an error; lets the file go."""
        try:
            self.file.release()
        except OSError as closing:  # network file systems tell here that a write failed
            error = error or closing.errno or errno.EIO
        if not error and got == self.wanted:
            return got
        if error:
            said = "dropped by close(cancel=True)" if error == errno.ECANCELED else os.strerror(error)
        else:
            error, said = errno.ENODATA, f"the file ends at byte {self.offset + got}"
        return AioError(error, said, path=self.file.path, offset=self.offset, wanted=self.wanted, got=got)


class Table:
    """The jobs under way, and the failures nobody has asked about yet."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self._failed: deque[AioFuture] = deque(maxlen=1000)

    def settle(self, ident: int, error: int, got: int) -> None:
        """A job is done."""
        job = self.jobs[ident]
        self.tell(job.future, job.outcome(error, got))
        del self.jobs[ident]  # after the future: who waits for all sees it here or done

    def tell(self, future: AioFuture, outcome: int | BaseException) -> None:
        """Settle the future; remember it if it failed."""
        if not isinstance(outcome, int):
            self._failed.append(future)
        future.settle(outcome)

    def futures(self) -> list[AioFuture]:
        """Of all jobs under way."""
        return [job.future for job in list(self.jobs.values())]

    def unseen(self) -> list[BaseException]:
        """Failures since the last call whose futures nobody asked."""
        found = []
        while self._failed:
            future = self._failed.popleft()
            error = None if future.seen else future.exception()
            if error is not None:
                found.append(error)
        return found


@dataclass(frozen=True, slots=True)
class Settings:
    """How much at a time."""

    queue_depth: int
    block_size: int
    threads: int | None
    max_pending_bytes: int


class Engine(Protocol):
    """Carries jobs out."""

    name: str
    table: Table

    def submit(self, job: Job) -> None:
        """Accept the job; waits while too many bytes are pending. Raises: Closed."""

    def stop(self, *, drop: bool) -> None:
        """Accept no more; with `drop`, hand no further block to the system."""

    def join(self) -> None:
        """After `stop`: wait until all is done and let resources go."""
