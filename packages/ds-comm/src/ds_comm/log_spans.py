"""Collectives under way, as the communication log sees them: on the host's clock, or by events in streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ds_core.ground.ticket import Waitable
from ds_core.train.clock import Clock

_FEW = 8
BLOCKED_S = 50e-6  # a wait this long was for something that had not arrived yet


class Ended(Protocol):
    """Told once a collective has arrived: seconds, seconds waited, and whether the arrival was seen."""

    def __call__(self, seconds: float, waited: float, seen: bool) -> None: ...


class Pending:
    """Events that are to be read once they have passed; each gives True then. Nothing is waited for."""

    def __init__(self) -> None:
        self._reads: deque[Callable[[], bool]] = deque()
        self._lock = threading.Lock()

    def append(self, read: Callable[[], bool]) -> None:
        self._reads.append(read)

    def read_some(self) -> None:
        """The oldest few, up to one that has not passed: cheap enough for every collective."""
        if not self._reads or not self._lock.acquire(blocking=False):  # another thread is at it
            return
        try:
            for _ in range(min(_FEW, len(self._reads))):
                if not self._reads[0]():
                    return
                self._reads.popleft()
        finally:
            self._lock.release()

    def read_all(self) -> None:
        """Each that has passed; the others stay."""
        with self._lock:
            for _ in range(len(self._reads)):
                read = self._reads.popleft()
                if not read():
                    self._reads.append(read)


class HostSpan:
    """On the CPU an arrival is noticed when somebody waits for it."""

    __slots__ = ("_begin", "_clock", "_ended", "_wait")

    def __init__(self, clock: Clock, ended: Ended) -> None:
        self._clock, self._ended = clock, ended
        self._wait: Any = None
        self._begin = clock.mark()

    def issued(self, works: Sequence[Waitable]) -> None:
        pass

    def waits(self) -> None:
        self._wait = self._clock.mark()

    def arrived(self) -> None:
        now = self._clock.mark()
        waited = self._clock.seconds(self._wait, now)
        self._ended(self._clock.seconds(self._begin, now), waited, waited >= BLOCKED_S)


class StreamSpan:
    """On an accelerator events mark the issue, the arrival and the wait; they are read once they have passed.

    The arrival is recorded in a callback of the work's future, which torch runs at once in a stream that is
    ordered after the work: neither the host nor the stream that computes waits for it.
    """

    __slots__ = ("_begin", "_clock", "_end", "_ended", "_pending", "_wait")

    def __init__(self, clock: Clock, ended: Ended, pending: Pending) -> None:
        self._clock, self._ended, self._pending = clock, ended, pending
        self._end: Any = None
        self._wait: Any = None
        self._begin = clock.mark()

    def issued(self, works: Sequence[Waitable]) -> None:
        future = getattr(works[-1], "get_future", None) if works else None
        if future is not None:
            future().then(self._record)

    def _record(self, future: object) -> None:
        self._end = self._clock.mark()

    def waits(self) -> None:
        self._wait = self._clock.mark()

    def arrived(self) -> None:
        after = self._clock.mark()
        if self._end is None:  # a work without a future: the stream that waited knows no better
            self._end = after
        self._pending.append(lambda: self._read(after))

    def _read(self, after: Any) -> bool:
        """True once all has passed, and is told."""
        if not (self._clock.passed(self._end) and self._clock.passed(after)):
            return False
        waited = max(0.0, self._clock.seconds(self._wait, after))
        self._ended(self._clock.seconds(self._begin, self._end), waited, True)
        return True


class CodingSpan:
    """Time around an encode or decode, told when it has passed."""

    def __init__(self, clock: Clock, told: Callable[[float], None], pending: Pending) -> None:
        self._clock, self._told, self._pending = clock, told, pending
        self._begin: Any = None

    def __enter__(self) -> None:
        self._begin = self._clock.mark()

    def __exit__(self, *error: object) -> None:
        end = self._clock.mark()
        if not self._read(end):
            self._pending.append(lambda: self._read(end))

    def _read(self, end: Any) -> bool:
        if not self._clock.passed(end):
            return False
        self._told(self._clock.seconds(self._begin, end))
        return True
