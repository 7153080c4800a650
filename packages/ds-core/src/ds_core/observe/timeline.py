"""Where a step's time and memory went, measured without making the device wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ds_core.observe.phases import Phases
from ds_core.train.clock import clock_for
from ds_core.train.engine import Engine

_PARTS = ("forward", "backward", "step", "wait")
_READ_EVERY = 64  # marks kept unread at most, in steps; a device is that far behind its host never


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step. `total` = forward + backward + step + other; `wait` is inside of these.

    `wait`: for collectives. `other`: data, the loss, Python. `live_bytes`: memory in use at the end of the
    step, `peak_bytes`: at most. On a device this is what tensors take, on the CPU the process's resident
    memory, of which the peak is the highest seen at the ends of forwards; 0 where it cannot be read.
    """

    total: float
    forward: float
    backward: float
    step: float
    wait: float
    live_bytes: int
    peak_bytes: int

    @property
    def other(self) -> float:
        return self.total - self.forward - self.backward - self.step

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "other": self.other}


@dataclass(slots=True)
class _Open:
    """A step whose marks have not been read."""

    begin: Any
    end: Any = None
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    live: int = 0
    peak: int = 0


class Timeline:
    """Measures the steps in `with Timeline(engine) as timeline:`, or of a loop, `Timeline(model, optimizer)`.

    On the CPU it reads the clock, on a device it records events that are read one step later or when asked.
    Nothing synchronises, and nothing is left on the model afterwards. On CUDA the peak of the memory
    statistics is reset at every step. The last `keep` steps are remembered.
    """

    def __init__(
        self, target: Engine | nn.Module, optimizer: Optimizer | None = None, *, keep: int = 1000
    ) -> None:
        if not isinstance(target, Engine) and optimizer is None:
            raise ValueError("Timeline(model) cannot see where a step ends: pass Timeline(model, optimizer)")
        model = target.model if isinstance(target, Engine) else target
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._target, self._optimizer = target, optimizer
        self._clock = clock_for(device)
        self._device = device
        self._memory: _HostMemory | _DeviceMemory | None = None
        self._closed: deque[StepTimes] = deque(maxlen=keep)
        self._unread: deque[_Open] = deque()
        self._now = _Open(None)
        self._phases: Phases | None = None

    def __enter__(self) -> Timeline:
        if self._phases is not None:
            raise RuntimeError("this timeline is running already")
        self._phases = Phases(self._target, self, optimizer=self._optimizer)
        self._memory = _memory_of(self._device)
        self._memory.restart()
        self._now = _Open(self._clock.mark())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._phases is not None:
            self._phases.detach()
            self._phases = None
        if self._memory is not None:
            self._memory.close()

    @property
    def steps(self) -> Sequence[StepTimes]:
        """The steps so far, oldest first. Waits for the device to have done them."""
        self._read(wait=True)
        return tuple(self._closed)

    def mean(self, skip: int = 0) -> StepTimes:
        """The average over the steps after the first `skip`; the peak is the highest. Waits like `steps`."""
        steps = self.steps[skip:]
        if not steps:
            raise ValueError(f"no step to average: {len(self._closed)} measured, {skip} skipped")
        names = ("total", "forward", "backward", "step", "wait")
        means = {name: sum(getattr(s, name) for s in steps) / len(steps) for name in names}
        return StepTimes(
            **means, live_bytes=steps[-1].live_bytes, peak_bytes=max(s.peak_bytes for s in steps)
        )

    def table(self, skip: int = 0) -> str:
        """Plain text: the mean step by part, with its share, and the memory."""
        mean = self.mean(skip)
        rows = [(name, getattr(mean, name)) for name in ("forward", "backward", "step", "other", "total")]
        rows.insert(4, ("(waiting)", mean.wait))
        lines = [f"{n:<10}{s * 1e3:10.2f} ms{s / mean.total if mean.total else 0:9.1%}" for n, s in rows]
        mib = 2**20
        lines.append(f"memory    {mean.live_bytes / mib:10.1f} MiB, peak {mean.peak_bytes / mib:.1f} MiB")
        return "\n".join(lines)

    # -- what Phases tells ---------------------------------------------------------------------------------

    def begin(self, phase: str, of: str) -> Any:
        """A phase begins; only those of the whole step and waiting are timed."""
        counts = phase == "wait" or (not of and phase in _PARTS)
        return (phase, self._clock.mark()) if counts else None

    def end(self, begun: Any) -> None:
        """A phase is over."""
        if begun is not None:
            phase, mark = begun
            self._now.spans.append((phase, mark, self._clock.mark()))
            if phase == "forward" and self._memory is not None:  # when activations are all there
                self._memory.sample()

    def stepped(self) -> None:
        """The weights were updated: the next step begins."""
        now = self._now
        now.end = self._clock.mark()
        if self._memory is not None:
            now.live, now.peak = self._memory.restart()
        self._unread.append(now)
        self._now = _Open(now.end)
        self._read(wait=len(self._unread) > _READ_EVERY)

    def _read(self, *, wait: bool) -> None:
        while self._unread and (wait or self._clock.passed(self._unread[0].end)):
            done = self._unread.popleft()
            parts = dict.fromkeys(_PARTS, 0.0)
            for phase, begin, end in done.spans:
                parts[phase] += self._clock.seconds(begin, end)
            total = self._clock.seconds(done.begin, done.end)
            self._closed.append(StepTimes(total, **parts, live_bytes=done.live, peak_bytes=done.peak))


class _HostMemory:
    """The process's resident memory, looked at where forwards and steps end."""

    def __init__(self, path: str = "/proc/self/statm") -> None:
        self._peak = 0
        self._page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        # Read again and again through one descriptor: opening the file takes twenty times as long.
        self._file: int | None = os.open(path, os.O_RDONLY) if Path(path).exists() else None

    def sample(self) -> int:
        if self._file is None:
            return 0
        now = int(os.pread(self._file, 128, 0).split()[1]) * self._page
        self._peak = max(self._peak, now)
        return now

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def restart(self) -> tuple[int, int]:
        """(in use, highest since the last time)."""
        now = self.sample()
        peak, self._peak = self._peak, now
        return now, peak


class _DeviceMemory:
    """What the caching allocator counts by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)

    def sample(self) -> int:
        return int(self._module.memory_allocated(self._device))

    def close(self) -> None:
        """Nothing is held."""

    def restart(self) -> tuple[int, int]:
        """(in use, highest since the last time)."""
        found = self.sample(), int(self._module.max_memory_allocated(self._device))
        self._module.reset_peak_memory_stats(self._device)
        return found


def _memory_of(device: torch.device) -> _HostMemory | _DeviceMemory:
    return _HostMemory() if device.type in ("cpu", "meta") else _DeviceMemory(device)
