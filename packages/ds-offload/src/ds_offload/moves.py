"""Moves between a device and homes: in order, beside the computation where the device has streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_offload.home import Home


class _Landing:
    """Futures of a file's part, as something to wait for."""

    def __init__(self, futures: Sequence[Future[int]]) -> None:
        self._futures = futures

    def wait(self) -> None:
        for future in self._futures:
            future.result()


class Moves:
    """On a CPU a move is a read or write of the file, or a copy. On a GPU it goes through pinned memory on a
    stream of its own, and the stream that asked waits for it when its ticket is waited for.
    """

    def __init__(self) -> None:
        self._stream: torch.Stream | None = None
        self._leaving: list[tuple[torch.Event, Home, int, Tensor, Callable[[], object]]] = []  # from a device

    def from_home(self, home: Home, begin: int, out: Tensor) -> Ticket:
        """Start filling `out` with elements from `begin` on."""
        if out.device.type == "cpu":
            futures = home.read(begin, out)
            return Ticket([_Landing(futures)] if futures else (), keepalive=(out,))
        staged = torch.empty(out.numel(), dtype=out.dtype, pin_memory=True)
        futures = home.read(begin, staged)

        def send() -> None:
            current = torch.accelerator.current_stream(out.device)
            with self._on(out.device, after=current) as stream:
                out.copy_(staged, non_blocking=True)
            current.wait_stream(stream)

        return Ticket([_Landing(futures)] if futures else (), keepalive=(out, staged), finish=send)

    def to_home(
        self, home: Home, begin: int, values: Tensor, then: Callable[[], object] = lambda: None
    ) -> None:
        """Start putting elements at `begin`; `values` is left alone and kept until they are there.

        `then` is called when the home may be read (`Home.read` waits for what is on its way to the file).
        """
        if values.device.type == "cpu":
            home.write(begin, values)
            then()
            return
        staged = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
        with self._on(values.device, after=torch.accelerator.current_stream(values.device)) as stream:
            staged.copy_(values, non_blocking=True)
            values.record_stream(stream)
            event = torch.Event(values.device)
            event.record(stream)
        self._leaving.append((event, home, begin, staged, then))
        while len(self._leaving) > 2:
            self._land(self._leaving.pop(0))

    def settle(self) -> None:
        """Every copy from the device is in its home, or on its way from there to the file."""
        while self._leaving:
            self._land(self._leaving.pop(0))

    def _land(self, leaving: tuple[torch.Event, Home, int, Tensor, Callable[[], object]]) -> None:
        event, home, begin, staged, then = leaving
        event.synchronize()
        home.write(begin, staged)
        then()

    def _on(self, device: torch.device, *, after: torch.Stream) -> torch.Stream:
        """The stream of moves, ordered after what was asked for before: to be entered."""
        if self._stream is None:
            self._stream = torch.Stream(device)
        self._stream.wait_stream(after)
        return self._stream
