"""An open file: one descriptor past the page cache where the file system allows it, one through it."""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import Literal

Mode = Literal["r", "w", "rw"]
_FLAGS = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT, "rw": os.O_RDWR | os.O_CREAT}


class AioError(OSError):
    """A request that failed: `path`, `offset`, and how many bytes were `wanted` and `got`.

    `got` counts from the start of the request, without a gap. `errno` is what the system said; ENODATA when
    the file ended before the request did.
    """

    def __init__(self, code: int, said: str, *, path: str, offset: int, wanted: int, got: int) -> None:
        super().__init__(code, f"{said}; wanted {wanted} bytes at offset {offset}, got {got}", path or None)
        self.path, self.offset, self.wanted, self.got = path, offset, wanted, got


class AioFile:
    """A file for many requests; `direct` says whether they go past the page cache, `why` why not.

    Mode "w" and "rw" create the file and never shorten it. Requests under way outlive `close`.
    Raises: OSError as os.open does; also for pipes.
    """

    def __init__(self, path: str | os.PathLike[str], mode: Mode = "r", *, direct: bool = True) -> None:
        if mode not in _FLAGS:
            raise ValueError(f"mode={mode!r}: allowed are 'r', 'w' and 'rw'")
        self.path = os.fspath(path)
        self.mode = mode
        self.buffered_fd = _open_plain(self.path, mode)
        self.direct_fd, self.why = -1, "not asked for"
        self._lock = threading.Lock()
        self._leases = 1  # the caller's own, until `close`
        self._closed = False
        try:
            found = os.fstat(self.buffered_fd)
            self.device, self.regular = found.st_dev, stat.S_ISREG(found.st_mode)
            self.folder = stat.S_ISDIR(found.st_mode)
            if direct:
                self.direct_fd, self.why = _open_direct(self.path, mode, found)
            if self.direct and hasattr(os, "posix_fadvise"):
                # Only edges come this way: reading ahead would be for nothing.
                os.posix_fadvise(self.buffered_fd, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            self._leases = 0
            self._close_all()
            raise

    def __del__(self) -> None:
        # Nobody can use it any more: requests hold the file, too.
        if getattr(self, "_leases", 0):
            self._leases = 0
            self._close_all()

    @property
    def direct(self) -> bool:
        """Do aligned blocks go past the page cache?"""
        return self.direct_fd >= 0

    def acquire(self) -> None:
        """Keep the descriptors for a request. Raises: ValueError if the file is closed."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path}: the AioFile is closed; open it anew")
            self._leases += 1

    def release(self) -> None:
        """Let them go; the last one to do so closes them."""
        with self._lock:
            self._leases -= 1
            last = self._leases == 0
        if last:
            self._close_all()

    def close(self) -> None:
        """Take no more requests; the descriptors go with the last one under way."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self.release()

    def __enter__(self) -> AioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_all(self) -> None:
        try:
            if self.direct_fd >= 0:
                os.close(self.direct_fd)
        finally:
            os.close(self.buffered_fd)


def _open_plain(path: str, mode: Mode) -> int:
    # Without O_NONBLOCK, opening a pipe waits for its other end; a file that keeps it is refused by io_uring.
    fd = os.open(path, _FLAGS[mode] | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            raise OSError(errno.ESPIPE, "pipes and sockets have no offsets", path)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_direct(path: str, mode: Mode, found: os.stat_result) -> tuple[int, str]:
    """(descriptor or -1, why)."""
    if not hasattr(os, "O_DIRECT"):
        return -1, "this system has no O_DIRECT"
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        return -1, "neither a file nor a block device"
    try:
        fd = os.open(path, (_FLAGS[mode] & ~os.O_CREAT) | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return -1, f"the file system refuses O_DIRECT ({error.strerror})"
    if not os.path.samestat(os.fstat(fd), found):
        os.close(fd)
        return -1, "the path got another file while it was being opened"
    return fd, "O_DIRECT"
