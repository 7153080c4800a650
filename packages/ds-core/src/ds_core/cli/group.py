"""Start the processes of a job on this host, watch them, and end all of them when one fails.

Plain subprocesses and not torch's elastic agent: the launcher then needs no torch (0.1 s to start, not 2),
owns each rank's process group and log, and knows which rank failed first. Ranks see what torchrun gives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ds_core.cli.echo import Echo
from ds_core.observe.host import MemoryWatch

_TICK_S = 0.5  # how often memory is looked at
_SETTLE_S = 0.3  # after the first failure, for the others to fail by themselves and say why
_REMOTE_S = 5.0  # what a remote host gets on top to end its own ranks
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)


@dataclass(frozen=True)
class Member:
    """One process to start: a rank on this host, or the connection to another host's launcher.

    `message` goes to its stdin, which then stays open: its end tells a remote launcher to stop.
    """

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str]
    log: Path
    echo: bool = False
    cores: Sequence[int] = ()
    message: bytes | None = None


@dataclass
class Ended:
    """How one member ended; `stopped` if this launcher ended it."""

    member: Member
    pid: int
    code: int
    seconds: float
    stopped: bool


@dataclass
class Result:
    """How the job ended: the members in the order in which they did, and what the whole was stopped by."""

    ended: list[Ended] = field(default_factory=list)
    interrupted: int = 0  # the signal that this launcher received
    memory: str | None = None  # evidence for an out-of-memory kill

    @property
    def failed(self) -> list[Ended]:
        """Those that failed by themselves, first one first."""
        return [e for e in self.ended if e.code != 0 and not e.stopped]


def run_group(members: Sequence[Member], *, cwd: Path, timeout: float, stop_on_eof: bool = False) -> Result:
    """Run all members to their end; when one fails or a signal comes, stop the rest in `timeout` seconds."""
    events: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    group = _Group(members, cwd, events)
    with _signals_to(events):
        try:
            group.start()
            if stop_on_eof:
                threading.Thread(target=_wait_for_eof, args=(events,), daemon=True).start()
            return group.watch(timeout)
        finally:
            group.kill()


class _Group:
    """The running members. All decisions are taken by the thread that calls `watch`."""

    def __init__(
        self, members: Sequence[Member], cwd: Path, events: queue.SimpleQueue[tuple[str, int]]
    ) -> None:
        self._members = members
        self._cwd = cwd
        self._events = events
        self._processes: list[subprocess.Popen[bytes]] = []
        self._echoes: list[Echo] = []
        self._running: set[int] = set()
        self._stop_sent = False

    def start(self) -> None:
        """Start every member in a process group of its own."""
        begin = time.monotonic()
        for member in self._members:
            self._processes.append(self._spawn(member))
        self._running = set(range(len(self._processes)))
        self._begin = begin
        # Threads only now: a child must be forked from a single-threaded launcher.
        for echo in self._echoes:
            echo.start()
        for index in self._running:
            threading.Thread(target=self._reap, args=(index,), daemon=True).start()

    def watch(self, timeout: float) -> Result:
        """Until no member runs."""
        result, memory = Result(), MemoryWatch()
        deadline: float | None = None  # when the next harsher measure is due
        patience = timeout + (_REMOTE_S if any(m.message is not None for m in self._members) else 0)
        while self._running:
            kind, value = self._next_event(deadline)
            now = time.monotonic()
            if kind == "ended":
                self._note(result, value)
                if result.failed and deadline is None:
                    deadline = now + _SETTLE_S
            elif kind == "signal" and value == signal.SIGWINCH:
                for echo in self._echoes:
                    echo.resize()
            elif kind == "signal":
                again, result.interrupted = bool(result.interrupted), result.interrupted or value
                self._stop_sent = True
                self._signal(signal.SIGKILL if again else value)
                deadline = now + patience
            elif deadline is not None and now >= deadline:
                self._signal(signal.SIGKILL if self._stop_sent else signal.SIGTERM)
                self._stop_sent = True
                deadline = now + patience
            else:
                memory.sample()
        killed = any(e.code in (-signal.SIGKILL, 128 + signal.SIGKILL) for e in result.failed)
        result.memory = memory.evidence() if killed else None
        for echo in self._echoes:
            echo.finish()
        return result

    def kill(self) -> None:
        """End what is still there, however this launcher came to its end.

        That includes what a failed member had started: its group lives on. After a success it may.
        """
        for process in self._processes:
            if process.poll() != 0:
                _signal_group(process, signal.SIGKILL)

    def _next_event(self, deadline: float | None) -> tuple[str, int]:
        wait = _TICK_S if deadline is None else max(0.0, min(_TICK_S, deadline - time.monotonic()))
        try:
            return self._events.get(timeout=wait)
        except queue.Empty:
            return ("tick", 0)

    def _note(self, result: Result, index: int) -> None:
        process, member = self._processes[index], self._members[index]
        self._running.discard(index)
        seconds = time.monotonic() - self._begin
        result.ended.append(Ended(member, process.pid, process.returncode, seconds, self._stop_sent))

    def _signal(self, number: int) -> None:
        """To every running member's process group; another host's launcher is told by closing its stdin."""
        for index in self._running:
            process = self._processes[index]
            if process.stdin is not None and number != signal.SIGKILL:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            else:
                _signal_group(process, number)

    def _reap(self, index: int) -> None:
        self._processes[index].wait()
        self._events.put(("ended", index))

    def _spawn(self, member: Member) -> subprocess.Popen[bytes]:
        log = member.log.open("ab", buffering=0)
        echo = Echo(log) if member.echo else None
        inherit = member.echo and member.message is None
        stdin = subprocess.PIPE if member.message is not None else None if inherit else subprocess.DEVNULL
        process = subprocess.Popen(
            list(member.argv),
            stdin=stdin,
            stdout=echo.stdout if echo else log,
            stderr=echo.stderr if echo else log,
            env=dict(member.environ),
            cwd=self._cwd,
            start_new_session=True,
            preexec_fn=_before_exec(member.cores, os.getpid()),
        )
        if echo is None:
            log.close()
        else:
            echo.close_child_ends()
            self._echoes.append(echo)
        if process.stdin is not None and member.message is not None:
            with contextlib.suppress(BrokenPipeError):  # it is dead already; its exit code says more
                process.stdin.write(member.message)
                process.stdin.flush()
        return process


def _before_exec(cores: Sequence[int], parent: int) -> Callable[[], None]:
    """What a child does between fork and exec: die with the launcher, and keep to its cores."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _wait_for_eof(events: queue.SimpleQueue[tuple[str, int]]) -> None:
    while os.read(0, 4096):
        continue
    events.put(("signal", int(signal.SIGTERM)))


@contextlib.contextmanager
def _signals_to(events: queue.SimpleQueue[tuple[str, int]]) -> Iterator[None]:
    """Turn the signals that concern the ranks into events; put the old handlers back afterwards."""

    def note(number: int, frame: FrameType | None) -> None:
        events.put(("signal", number))

    before = {number: signal.signal(number, note) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
