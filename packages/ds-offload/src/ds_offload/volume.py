"""Volume: one file of this process on a fast disk, in which extents are allocated, read and written."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import uuid
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from ds_kernels.aio import AioFile, AsyncIO
from ds_kernels.aio.job import AioFuture

PAGE = 4096  # of which O_DIRECT wants multiples

_log = logging.getLogger("ds_offload")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + nbytes) of a volume; what they hold at first is arbitrary."""

    offset: int
    nbytes: int


class Volume:
    """A file that has no name any more: it goes with the process, however that ends, and leaks nothing.

    Space is allocated before it is used, so a full disk is an OSError of `allocate` and never a crash in the
    middle of a write to mapped memory. Requests go through one `AsyncIO`, past the page cache where the file
    system allows it. Safe to use from several threads.
    Raises: ValueError for a folder that cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], io: AsyncIO | None = None) -> None:
        self.folder = os.fspath(folder)
        if not os.path.isdir(self.folder):
            raise ValueError(
                f"nvme={self.folder!r} is no folder; give one on the disk that shall hold the state"
            )
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"nvme={self.folder!r}: this process may not write there; give another folder")
        self.path = os.path.join(self.folder, f"ds-offload-{os.getpid()}-{uuid.uuid4().hex[:8]}.bin")
        self.file = AioFile(self.path, "rw")
        os.unlink(self.path)
        if not self.file.direct:
            _log.warning("ds-offload: %s goes through the page cache: %s", self.folder, self.file.why)
        self._own = io is None
        self.io = io or AsyncIO(queue_depth=64, block_size=1 << 20)
        self._lock = threading.Lock()
        self._closed = False
        self._free: list[Extent] = []  # sorted by offset, never two that touch
        self._given_back: deque[Extent] = deque()  # see [Note: freed while another is allocated]
        self.size = 0  # of the file
        self.used = 0  # bytes in extents
        self.read_bytes = self.written_bytes = 0  # moved since it was made

    @property
    def fd(self) -> int:
        """The descriptor through the page cache, for mapping."""
        return self.file.buffered_fd

    # -- space ---------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Extent:
        """Bytes that are ours from here on, in whole pages.

        Raises: OSError naming the path: ENOSPC with the bytes wanted and what is free; EBADF once closed.
        """
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            self._take_back()
            if self._closed:  # the descriptor's number may be another file's by now
                raise OSError(errno.EBADF, f"wanted {size} bytes of a volume that is closed", self.path)
            for index, hole in enumerate(self._free):
                if hole.nbytes >= size:
                    rest = Extent(hole.offset + size, hole.nbytes - size)
                    self._free[index : index + 1] = [rest] if rest.nbytes else []
                    self.used += size
                    return Extent(hole.offset, size)
            found = Extent(self.size, size)
            self._grow(size)
            self.used += size
            return found

    def _grow(self, size: int) -> None:
        try:
            os.posix_fallocate(self.fd, self.size, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)  # what a partial success took
            left = shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno or errno.EIO,
                f"{error.strerror}: wanted {size} bytes more beside {self.used}, {left} are free; "
                "keep less on this disk, or give another folder",
                self.path,
            ) from None
        self.size += size

    def free(self, extent: Extent) -> None:
        """Give bytes back to this volume; after `close` there is nothing to give back. Requests on them must
        be done.

        [Note: freed while another is allocated] Tensors end when the collector finds them, which may be in
        the middle of `allocate` on this very thread. So nothing here waits: whoever has the lock takes them.
        """
        self._given_back.append(extent)
        if self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._given_back:
            self._merge(self._given_back.popleft())

    def _merge(self, extent: Extent) -> None:
        if self._closed:  # the descriptor's number may be another file's by now
            return
        self.used -= extent.nbytes
        holes = sorted([*self._free, extent], key=lambda hole: hole.offset)
        merged = holes[:1]
        for hole in holes[1:]:
            last = merged[-1]
            if last.offset + last.nbytes == hole.offset:
                merged[-1] = Extent(last.offset, last.nbytes + hole.nbytes)
            else:
                merged.append(hole)
        if merged and merged[-1].offset + merged[-1].nbytes == self.size:
            self.size = merged.pop().offset
            os.ftruncate(self.fd, self.size)
        self._free = merged

    # -- bytes ---------------------------------------------------------------------------------------------

    def read(self, offset: int, tensor: Tensor) -> AioFuture:
        """Fill a contiguous CPU tensor with the bytes from `offset`; leave it alone until that is done."""
        self.read_bytes += tensor.nbytes
        return self.io.read(self.file, tensor, offset)

    def write(self, offset: int, tensor: Tensor) -> AioFuture:
        """Put a contiguous CPU tensor's bytes at `offset`; leave it alone until that is done."""
        self.written_bytes += tensor.nbytes
        return self.io.write(self.file, tensor, offset)

    def close(self) -> None:
        """Give the file back, after what is under way; again is harmless."""
        with self._lock:
            self._closed = True
        self.file.close()
        if self._own:
            self.io.close()
