"""What this rank has sent so far, group by group: the evidence for the day when ranks stop agreeing."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

from ds_core.ground.ticket import Waitable

RING = 256  # collectives that a lane remembers

_LIBRARIES = tuple({path for path in sysconfig.get_paths().values() if path})
_INSTALLED = ("site-packages", "dist-packages")  # of this environment, or of one that it borrows from
_SUITE = frozenset({"core", "kernels", "zero", "offload", "comm", "pipe", "moe"})
_SUITE |= frozenset({"inference", "compression", "chat"})
_CALLERS = 3  # user lines that a collective is remembered with, the innermost first

Lines = tuple[tuple[CodeType, int], ...]


@dataclass(slots=True, frozen=True)
class Flight:
    """One collective as this rank issued it.

    `digest` covers it and everything before it in its lane; `tag` is what its messages carry, so that those
    of different collectives never meet.
    """

    number: int
    op: str
    dtype: torch.dtype
    numel: int
    about: str
    digest: int
    tag: int
    lines: Lines

    def __str__(self) -> str:
        about = f" of {self.about}" if self.about else ""
        return f"{self.op}{about}, {self.numel} x {str(self.dtype).removeprefix('torch.')}"

    @property
    def where(self) -> str:
        """The user's source lines, the innermost first; empty where there was none."""
        return place(self.lines)


class Guard(Protocol):
    """Who knows whether ranks still agree."""

    def check(self) -> None:
        """Raises DesyncError when they do not."""
        ...

    def explain(self, error: Exception) -> None:
        """Raises DesyncError in place of an error of the wire, if there is more to say."""
        ...


class Lane:
    """The collectives of one process group, numbered from 1.

    Recording one takes a few microseconds and sends nothing. Who waits says for what (`waiting`), so that
    another thread can tell.
    """

    def __init__(self, name: str, ranks: Sequence[int], guard: Guard | None = None) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.number = 0
        self.digest = 0
        self.waiting: Flight | None = None
        self._guard = guard
        self._ring: list[Flight | None] = [None] * RING

    def check(self) -> None:
        """Raises DesyncError when the ranks of this job are known to have parted."""
        if self._guard is not None:
            self._guard.check()

    def record(self, op: str, tensor: Tensor, about: str = "") -> Flight:
        """The next collective of this lane. Raises DesyncError when it can no longer take place."""
        self.check()
        number = self.number + 1
        dtype, numel = tensor.dtype, tensor.numel()
        text = f"{op} {dtype} {numel} {about}".encode()
        digest, tag = crc32(text, self.digest), crc32(text, number) & 0x7FFFFFFF
        flight = Flight(number, op, dtype, numel, about, digest, tag, user_lines(sys._getframe(1)))
        self._ring[number % RING] = flight
        self.number, self.digest = number, digest
        return flight

    def start(self, flight: Flight, issue: Callable[[], Sequence[Waitable]]) -> Waitable:
        """Hand a collective to the wire. Waiting for it raises DesyncError when ranks disagree."""
        self.waiting = flight  # choosing a route may wait
        try:
            works = issue()
        except RuntimeError as error:
            self._explain(flight, error)
            raise
        self.waiting = None
        return _Awaited(self, flight, works)

    def wait(self, flight: Flight, works: Sequence[Waitable]) -> None:
        """Wait, and be seen to wait."""
        self.waiting = flight
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._explain(flight, error)
            raise
        self.waiting = None

    def _explain(self, flight: Flight, error: RuntimeError) -> None:
        self.waiting = flight
        if self._guard is not None:
            self._guard.explain(error)

    def disagree(self) -> None:
        """Ranks have compared their digests, and they differ. Raises DesyncError."""
        error = RuntimeError(f"ranks issued different collectives before this one of {self.name}")
        if self._guard is not None:
            self._guard.explain(error)
        raise error

    def recent(self, count: int = RING) -> list[Flight]:
        """The last collectives, oldest first."""
        last = self.number
        found = [self._ring[number % RING] for number in range(max(1, last - min(count, RING) + 1), last + 1)]
        return [flight for flight in found if flight is not None]


@dataclass(slots=True, frozen=True)
class _Awaited:
    """The works of one collective, as one."""

    lane: Lane
    flight: Flight
    works: Sequence[Waitable]

    def wait(self) -> None:
        self.lane.wait(self.flight, self.works)


def signature(lanes: Sequence[Lane]) -> list[float]:
    """Four numbers that are exact in fp32: the maximum over ranks ends with the negative of its first half
    if, and only if, all ranks issued the same collectives in these lanes."""
    digest = crc32(repr([(lane.number, lane.digest) for lane in lanes]).encode())
    halves = [float(digest >> 16), float(digest & 0xFFFF)]
    return halves + [-half for half in halves]


def is_one_signature(largest: Sequence[float]) -> bool:
    """Were the signatures of all ranks the same, given the maximum of each number?"""
    return all(high == -low for high, low in zip(largest[:2], largest[2:], strict=True))


def user_lines(frame: FrameType | None) -> Lines:
    """The innermost lines outside of Python's library, installed packages and this suite."""
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _CALLERS:
        if _is_users(frame.f_code, frame.f_globals.get("__name__", "")):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _is_users(code: CodeType, module: str) -> bool:
    package = module.partition(".")[0]
    ours = package[:3] == "ds_" and package[3:] in _SUITE
    file = code.co_filename
    installed = file.startswith(_LIBRARIES) or any(part in file for part in _INSTALLED)
    return not ours and not installed and file[0] != "<"


def place(lines: Lines) -> str:
    """Such as "model.py:12 in forward < train.py:40 in main"; empty where no line is the user's."""
    return " < ".join(f"{Path(code.co_filename).name}:{line} in {code.co_name}" for code, line in lines)
