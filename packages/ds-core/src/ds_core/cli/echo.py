"""Show one process's output on this terminal and keep it in a log file, progress bars included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import sys
import termios
import threading
from typing import BinaryIO

_DRAIN_S = 2.0  # for what a grandchild still holds open when the process itself has ended


class Echo:
    """Copies a child's stdout and stderr to ours and to a log.

    If ours is a terminal, the child gets a terminal of the same size, so that it draws what it would draw
    there; otherwise pipes. `stdout` and `stderr` are the ends for the child.
    """

    def __init__(self, log: BinaryIO) -> None:
        self._log = log
        if sys.stdout.isatty() and sys.stderr.isatty():
            source, self.stdout = pty.openpty()
            self.stderr = self.stdout
            _copy_size(1, source)
            _pass_through(self.stdout)
            self._routes = [(source, 1)]
        else:
            out, self.stdout = os.pipe()
            err, self.stderr = os.pipe()
            self._routes = [(out, 1), (err, 2)]
        self._threads = [
            threading.Thread(target=self._pump, args=route, daemon=True) for route in self._routes
        ]

    def close_child_ends(self) -> None:
        """Call once the child has them."""
        for fd in {self.stdout, self.stderr}:
            os.close(fd)

    def resize(self) -> None:
        """Our terminal has another size now."""
        for source, target in self._routes:
            _copy_size(target, source)

    def start(self) -> None:
        """Begin copying."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until all is copied."""
        for thread in self._threads:
            thread.join(_DRAIN_S)

    def _pump(self, source: int, target: int) -> None:
        shown, rest = True, b""
        while data := _read(source):
            if shown:
                shown = _write_all(target, data)
            # Whole lines for the log, so that stdout and stderr do not mix within one.
            rest += data
            whole = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
            self._write_log(rest[:whole])
            rest = rest[whole:]
        self._write_log(rest)

    def _write_log(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop the run
            self._log.write(data)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # how a terminal says that its other end is closed
        return b""


def _write_all(fd: int, data: bytes) -> bool:
    """False when nobody reads any more (`ds launch ... | head`): the run then goes on without us."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True


def _copy_size(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8))


def _pass_through(fd: int) -> None:
    """No output processing in the child's terminal: ours does it."""
    mode = termios.tcgetattr(fd)
    mode[1] &= ~termios.OPOST
    termios.tcsetattr(fd, termios.TCSANOW, mode)
