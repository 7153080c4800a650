"""Home: the bytes of one named tensor, partly in host memory and partly in a file, as one plain tensor."""

from __future__ import annotations

import ctypes
import threading
import weakref
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ds_offload.mapped import Mapping
from ds_offload.pages import PAGE, swap_pages
from ds_offload.volume import Extent, Volume


class Home:
    """`numel` elements of `dtype`: the first `host_numel` in memory, the rest in `volume`.

    `tensor` shows all of them; see [Note: two ways to one file] for what that means. The space in the file is
    given back when the last tensor over it is gone, whoever holds it.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, file_numel: int, volume: Volume | None, *, pinned: bool = False
    ) -> None:
        self.numel, self.dtype = numel, dtype
        self.host_numel = numel - file_numel
        self.pending: list[Future[int]] = []  # writes under way to the file
        self._ranges: dict[Future[int], tuple[int, int]] = {}  # of elements, which they write
        self._waiting = threading.Lock()
        item = dtype.itemsize
        if file_numel:
            assert volume is not None
            self._extent = extent = volume.allocate(file_numel * item)
            mapping = Mapping(self.host_numel * item, file_numel * item, fd=volume.fd, offset=extent.offset)
            self._giving_back = _give_back(mapping, volume, extent)
        else:
            mapping = Mapping(self.host_numel * item)
        self._mapping, self._volume = mapping, volume
        self.pinned = pinned and bool(self.host_numel) and mapping.pin()
        self.tensor: Tensor = mapping.tensor.view(dtype)

    @property
    def host_bytes(self) -> int:
        return self.host_numel * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        return (self.numel - self.host_numel) * self.dtype.itemsize

    def in_memory(self, begin: int, end: int) -> bool:
        """Is a range of elements in host memory, so that a view of it is as good as a copy?"""
        return end <= self.host_numel

    def read(self, begin: int, out: Tensor) -> list[Future[int]]:
        """Fill a CPU tensor with the elements from `begin`: what is in memory now, the rest when done.

        Waits for writes under way to the same elements, and for no others.
        """
        self._after_writes(begin, begin + out.numel())
        split = max(0, min(out.numel(), self.host_numel - begin))
        if split:
            out[:split].copy_(self.tensor[begin : begin + split])
        if split == out.numel():
            return []
        assert self._volume is not None
        return [self._volume.read(self._at(begin + split), out[split:])]

    def write(self, begin: int, values: Tensor) -> list[Future[int]]:
        """Put a CPU tensor's elements at `begin`; leave it alone until the futures, if any, are done."""
        split = max(0, min(values.numel(), self.host_numel - begin))
        if split:
            self.tensor[begin : begin + split].copy_(values[:split])
        if split == values.numel():
            return []
        assert self._volume is not None
        future = self._volume.write(self._at(begin + split), values[split:])
        self._ranges[future] = (begin, begin + values.numel())
        self.pending.append(future)
        return [future]

    def _after_writes(self, begin: int, end: int) -> None:
        with self._waiting:  # else a future that another thread has taken to wait for would be missed
            met = [future for future in list(self.pending) if self._meets(future, begin, end)]
            failed = [future for future in met if future.exception() is not None]
        if failed:
            self.settle()  # which tells of it, once

    def _meets(self, future: Future[int], begin: int, end: int) -> bool:
        low, high = self._ranges.get(future, (0, self.numel))
        return low < end and begin < high

    def take(self, begin: int, values: Mapping, numel: int) -> list[Future[int]]:
        """The elements at `begin` become the first `numel` of `values`, whose contents are arbitrary then.

        In memory pages change places where they can, and nothing is copied; as for `write` otherwise.
        """
        nbytes, item = numel * self.dtype.itemsize, self.dtype.itemsize
        if self.in_memory(begin, begin + numel) and not self.pinned:
            whole_pages = nbytes % PAGE == 0 or (begin + numel == self.numel and not self.file_bytes)
            if whole_pages and swap_pages(self._mapping.base + begin * item, values.base, nbytes):
                torch.autograd.graph.increment_version(self.tensor)
                return []
        return self.write(begin, values.tensor[:nbytes].view(self.dtype))

    def become(self, other: Home) -> None:
        """Hold what `other` holds, a home of the same kind; what that holds afterwards is arbitrary.

        Pages and the file's extents change places; what is pinned is copied. Nobody may look meanwhile.
        """
        assert (self.numel, self.dtype, self.host_numel) == (other.numel, other.dtype, other.host_numel)
        self.settle()
        other.settle()
        pinned, host = self.pinned or other.pinned, self.host_numel
        mine, theirs = self._mapping, other._mapping
        if host and (pinned or not swap_pages(mine.base, theirs.base, self.host_bytes)):
            self.tensor[:host].copy_(other.tensor[:host])
        if self._volume is not None and self.file_bytes:
            for home in (self, other):
                home._giving_back.detach()
            self._extent, other._extent = other._extent, self._extent
            for home in (self, other):
                home._mapping.show(self._volume.fd, home._extent.offset)
                home._giving_back = _give_back(home._mapping, self._volume, home._extent)
        torch.autograd.graph.increment_version(self.tensor)

    def settle(self) -> None:
        """Every write is over, whichever thread waits. Raises AioError for the first that failed, once."""
        errors = self.abandon()
        if errors:
            raise errors[0]

    def abandon(self) -> list[BaseException]:
        """Every write is over, whichever thread waits first; what went wrong, told once."""
        with self._waiting:
            errors = []
            while self.pending:  # another thread may be adding to it
                future = self.pending.pop(0)
                if (error := future.exception()) is not None:
                    errors.append(error)
                self._ranges.pop(future, None)
            return errors

    def forget(self) -> None:
        """Let go of the file's pages that a plain look at the tensor brought into memory."""
        self._mapping.forget()

    def _at(self, element: int) -> int:
        return self._extent.offset + (element - self.host_numel) * self.dtype.itemsize


def _give_back(mapping: Mapping, volume: Volume, extent: Extent) -> weakref.finalize[..., ctypes.Array[Any]]:
    """The extent goes when the last tensor over the mapping has gone."""
    found = weakref.finalize(mapping.memory, volume.free, extent)
    found.atexit = False
    return found
