"""When something happened on a device: the host's clock, or events in a stream that are read later."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks are cheap and wait for nothing; reading the time between two may have to wait for the device."""

    def mark(self) -> Any: ...
    def seconds(self, begin: Any, end: Any) -> float: ...
    def passed(self, mark: Any) -> bool: ...


class HostClock:
    """The CPU computes when it is called, so its own clock tells."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def passed(self, mark: float) -> bool:
        return True


class StoppedClock(HostClock):
    """Meta tensors take no time."""

    def mark(self) -> float:
        return 0.0


class StreamClock:
    """Events in the current stream of an accelerator: nothing waits until the seconds are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.Event:
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        begin.synchronize()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def passed(self, mark: torch.Event) -> bool:
        return bool(mark.query())


def clock_for(device: torch.device) -> Clock:
    """The clock that tells when this device did something."""
    if device.type == "meta":
        return StoppedClock()
    return HostClock() if device.type == "cpu" else StreamClock(device)
