"""Snapshots for background saves: reused, paged-in host memory, filled while training runs on."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64
_PAGE = 4096


class Staging:
    """One host buffer that outlives saves: paging memory in costs more than copying into it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Make room for copies of `tensors` now, so that the first save does not pay for it."""
        wanted = sum(_padded(tensor) for tensor in tensors)
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if self._buffer.numel() < wanted or (on_device and not self._buffer.is_pinned()):
            self.release()
            self._buffer = _paged_in(wanted, pinned=on_device)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Room for a copy of each flat tensor, in its dtype; valid until the next `reserve` or `views`."""
        self.reserve(tensors)
        found, at = [], 0
        for tensor in tensors:
            piece = self._buffer[at : at + tensor.numel() * tensor.dtype.itemsize]
            found.append(piece.view(tensor.dtype))
            at += _padded(tensor)
        return found

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0, dtype=torch.uint8)


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.dtype.itemsize // _ALIGN) * _ALIGN


def _paged_in(size: int, *, pinned: bool) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    buffer.numpy()[::_PAGE] = 0
    return buffer


class Snapshot:
    """Copies of tensors at the moment of the save.

    [Note: what may still change] A part that offers `before_next_change` promises that its tensors stay as
    they are until it has called the function given to it; that function is `wait_late`, so those copies may
    run in the background. Every other part may change as soon as `save` returns, and is copied before that.
    With `held` there are tensors beside them that are written without a copy: nothing may change before
    `let_go`.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        late: Sequence[bool],
        *,
        held: bool = False,
    ) -> None:
        self._held = held
        self._now = [
            pair for pair, is_late in zip(zip(copies, sources, strict=True), late, strict=True) if not is_late
        ]
        self._late = [
            pair for pair, is_late in zip(zip(copies, sources, strict=True), late, strict=True) if is_late
        ]
        self._late_done = threading.Event()
        self._ready = [
            _record(device) for device in {source.device for source in sources} if device.type != "cpu"
        ]

    def copy_now(self) -> None:
        """Copy what may change at once, on the calling thread."""
        for copy, source in self._now:
            copy.copy_(source, non_blocking=True)
        for event in [_record(source.device) for _, source in self._now if source.device.type != "cpu"]:
            event.synchronize()
        self._now = []

    def copy_late(self) -> None:
        """Copy the rest, on the writer's thread: by numpy, or on a stream of its own."""
        try:
            for event in self._ready:
                event.synchronize()
            for copy, source in self._late:
                if source.device.type == "cpu":
                    np.copyto(copy.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
                else:
                    _copy_aside(copy, source)
        finally:
            if not self._held:
                self.let_go()

    def let_go(self) -> None:
        """Nothing more will be read from the live tensors."""
        self._late = []
        self._late_done.set()

    def wait_late(self) -> None:
        """Return once the live tensors may change."""
        self._late_done.wait()


def _record(device: torch.device) -> torch.Event:
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def _copy_aside(copy: Tensor, source: Tensor) -> None:
    stream = torch.Stream(source.device)
    with stream:
        copy.copy_(source, non_blocking=True)
    stream.synchronize()
