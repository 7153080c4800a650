"""Where activations go and come back from: pinned host memory of an accelerator, or extents of a volume."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_core.ground.accelerator import Accelerator, return_freed_memory
from ds_kernels.aio import AioError
from ds_kernels.aio.job import AioFuture
from ds_offload.slabs import Slabs
from ds_offload.volume import Extent, Volume

_RETURN_BYTES = 128 << 20  # returning takes milliseconds, so not for every tensor


class Copy(Protocol):
    """A copy under way; holding it keeps both its ends alive."""

    def done(self) -> bool:
        """Has it happened? Does not wait."""

    def order(self) -> None:
        """What the current stream does from here on comes after it."""

    def block(self) -> None:
        """Return when it has happened."""


class Lane(Protocol):
    """Copies between a device and host memory, beside what the device computes."""

    def host(self, nbytes: int) -> Tensor: ...

    def device(self, nbytes: int) -> Tensor: ...

    def copy(self, target: Tensor, source: Tensor) -> Copy: ...


class Place(Protocol):
    """Where one piece's bytes are outside of the device's memory."""

    nbytes: int

    def left(self, *, wait: bool) -> bool:
        """Are the bytes there, so that the source may go? Raises: OSError if they will never be."""

    def begin(self) -> None:
        """Start to bring them back, unless that has begun."""

    def arrive(self) -> Tensor:
        """[nbytes] uint8 on the device, ready for the current stream. Raises: OSError."""

    def arrived(self) -> bool:
        """Would `arrive` return without waiting?"""

    def put_off(self) -> None:
        """Do not bring them back now after all."""

    def release(self, *, wait: bool) -> bool:
        """Give the place up. False while something is under way there: ask again, or wait for it."""


class Tier(Protocol):
    """What holds places."""

    def send(self, source: Tensor) -> Place:
        """Start to take [nbytes] uint8 away; keep `source` until it `left`. Raises: OSError without room."""

    def let_go(self, nbytes: int) -> None:
        """Sources of so many bytes were freed."""

    def trim(self) -> None:
        """Let go of what is kept for the next places."""

    def close(self) -> None: ...


class StreamLane:
    """Copies on a stream of their own. Made of one device, for one thread at a time.

    [Note: who waits for a copy] A copy waits for what the computing stream had been given before it. Memory
    comes from the computing stream, which is told to wait for the copy before the memory is let go: the
    allocator may then lend it out again without asking anyone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            target.copy_(source, non_blocking=True)
        event = torch.Event(self._device)
        event.record(self._stream)
        return _StreamCopy(event, self._device, target, source)


class _StreamCopy:
    def __init__(self, event: torch.Event, device: torch.device, target: Tensor, source: Tensor) -> None:
        self._event, self._device = event, device
        self._ends = (target, source)

    def done(self) -> bool:
        return bool(self._event.query())

    def order(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)

    def block(self) -> None:
        self._event.synchronize()


class HostTier:
    """Pinned host memory. Not for tensors that are in host memory already."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def send(self, source: Tensor) -> Place:
        return _HostPlace(self._lane, source)

    def let_go(self, nbytes: int) -> None:
        pass

    def trim(self) -> None:
        pass

    def close(self) -> None:
        pass


class _HostPlace:
    def __init__(self, lane: Lane, source: Tensor) -> None:
        self.nbytes = source.nbytes
        self._lane = lane
        self._slab = lane.host(source.nbytes)
        self._out: Copy | None = lane.copy(self._slab, source)
        self._back: tuple[Tensor, Copy] | None = None

    def left(self, *, wait: bool) -> bool:
        if self._out is None:
            return True
        if wait:
            self._out.order()  # not `block`: the device waits, this thread does not
        elif not self._out.done():
            return False
        self._out = None
        return True

    def begin(self) -> None:
        if self._back is None:
            memory = self._lane.device(self.nbytes)
            self._back = (memory, self._lane.copy(memory, self._slab))

    def arrive(self) -> Tensor:
        self.begin()
        assert self._back is not None
        memory, copy = self._back
        copy.order()
        self._back = None
        return memory

    def arrived(self) -> bool:
        return self._back is not None and self._back[1].done()

    def put_off(self) -> None:
        if self._back is not None:  # see [Note: who waits for a copy]
            self._back[1].order()
            self._back = None

    def release(self, *, wait: bool) -> bool:
        self.left(wait=True)
        self.put_off()
        return True


class DiskTier:
    """Extents of a volume; from an accelerator, by way of pinned host memory.

    Extents are kept for the next piece of the same size: a step saves what the one before saved, and giving
    them to the file system and taking them again costs as much as a third of writing them. `own`: the volume
    is closed with the tier.
    """

    def __init__(self, volume: Volume, lane: Lane | None, slabs: Slabs, *, own: bool) -> None:
        self.volume, self.lane, self.slabs = volume, lane, slabs
        self._own = own
        self._spare: dict[int, list[Extent]] = {}  # by bytes asked for
        self._freed_bytes = 0  # of host memory, since the process gave its own back to the system

    def send(self, source: Tensor) -> Place:
        return _DiskPlace(self, source)

    def let_go(self, nbytes: int) -> None:
        """On a CPU: the C library would keep half of what has left, in holes of its heap."""
        self._freed_bytes += nbytes
        if self.lane is None and self._freed_bytes >= _RETURN_BYTES:
            self._freed_bytes = 0
            return_freed_memory(Accelerator(torch.device("cpu")))

    def room(self, nbytes: int) -> Extent:
        """Raises: OSError when the disk is full."""
        if spare := self._spare.get(nbytes):
            return spare.pop()
        try:
            return self.volume.allocate(nbytes)
        except OSError:
            self.trim()  # of other sizes
        return self.volume.allocate(nbytes)

    def give_back(self, extent: Extent, nbytes: int) -> None:
        self._spare.setdefault(nbytes, []).append(extent)

    def trim(self) -> None:
        for extents in self._spare.values():
            while extents:
                self.volume.free(extents.pop())

    def host(self, nbytes: int) -> Tensor:
        return self.slabs.lease(nbytes) if self.lane is None else self.lane.host(nbytes)

    def close(self) -> None:
        if self._own:
            self.volume.close()
        else:
            self.trim()


class _DiskPlace:
    """Out: copy to the host (with a lane), write. Back: read, copy to the device (with a lane).

    Each step is begun when somebody asks and the one before is done; requests and copies hold their memory.
    """

    def __init__(self, tier: DiskTier, source: Tensor) -> None:
        self.nbytes = source.nbytes
        self._tier = tier
        self._extent: Extent | None = tier.room(source.nbytes)
        self._slab: Tensor | None = None
        self._copy: Copy | None = None
        self._request: AioFuture | None = None
        self._strays: list[AioFuture] = []  # reads under way that nobody wants any more
        self._there = False
        try:
            if tier.lane is None:
                self._request = tier.volume.write(self._extent.offset, source)
            else:
                self._slab = tier.host(source.nbytes)
                self._copy = tier.lane.copy(self._slab, source)
        except BaseException:
            tier.give_back(self._extent, source.nbytes)
            raise

    def left(self, *, wait: bool) -> bool:
        if self._there:
            return True
        if self._copy is not None and (wait or self._copy.done()):
            self._copy.block()
            self._copy = None
            assert self._slab is not None
            assert self._extent is not None
            self._request = self._tier.volume.write(self._extent.offset, self._slab)
        if self._request is None or not (wait or self._request.done()):
            return False
        _ask(self._request)
        self._there, self._request, self._slab = True, None, None
        return True

    def begin(self) -> None:
        assert self._extent is not None
        if self._slab is None:
            self._slab = self._tier.host(self.nbytes)
            self._request = self._tier.volume.read(self._extent.offset, self._slab)
        lane = self._tier.lane
        if lane is not None and self._copy is None and self._request is not None and self._request.done():
            _ask(self._request)
            memory = lane.device(self.nbytes)
            self._slab, self._copy = memory, lane.copy(memory, self._slab)

    def arrive(self) -> Tensor:
        self.begin()
        assert self._request is not None
        try:
            _ask(self._request)
        except BaseException:
            self.put_off()
            raise
        self.begin()
        if self._copy is not None:
            self._copy.order()
        memory, self._slab, self._copy, self._request = self._slab, None, None, None
        assert memory is not None
        return memory

    def arrived(self) -> bool:
        if self._request is None or not self._request.done():
            return False
        return self._tier.lane is None or (self._copy is not None and self._copy.done())

    def put_off(self) -> None:
        if self._copy is not None:  # see [Note: who waits for a copy]
            self._copy.order()
        if self._request is not None and not self._request.cancel():
            self._strays.append(self._request)
        self._slab = self._copy = self._request = None

    def release(self, *, wait: bool) -> bool:
        if self._extent is None:
            return True
        self.put_off()
        if not wait and not all(request.done() for request in self._strays):
            return False
        for request in self._strays:
            request.exception()  # waits; and what went wrong with unwanted bytes is no failure
        self._tier.give_back(self._extent, self.nbytes)
        self._extent = None
        return True


def _ask(request: AioFuture) -> None:
    """Wait for a request. Raises: AioError.

    Not the request's own: its AsyncIO remembers that one, with the frames it was raised through, and so the
    graph that they were about.
    """
    error = request.exception()
    if isinstance(error, AioError):
        said = str(error.strerror).partition("; wanted ")[0]
        code, path = error.errno or 0, error.path
        raise AioError(code, said, path=path, offset=error.offset, wanted=error.wanted, got=error.got)
    if error is not None:
        raise error
