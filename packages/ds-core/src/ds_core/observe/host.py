"""What this host has: cores, memory, accelerators; and whether the kernel killed for want of memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_NEARLY = 0.95  # of the memory there is: above it a SIGKILL is likely the kernel's
_DEVICE_FILES = ("nvidia0", "nvidiactl", "kfd", "dxg", "davinci0", "dri", "accel")


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut down to the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def count_accelerators() -> int:
    """Accelerators that ranks of this host can have; imports torch only where there is a device file."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    if not any(Path("/dev", name).exists() for name in _DEVICE_FILES):
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that exist and that are in use: of the container if that has a limit."""

    total: int
    used: int


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory | None:
    """The tighter of the host's memory and the container's limit; None where neither can be read."""
    found = [m for m in (_host_memory(proc), _container_memory(cgroup)) if m is not None]
    return min(found, key=lambda memory: memory.total - memory.used, default=None)


def _host_memory(proc: Path) -> Memory | None:
    try:
        lines = dict(
            line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line
        )
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    return Memory(total, total - free)


def _container_memory(cgroup: Path) -> Memory | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return Memory(int((cgroup / limit).read_text()), int((cgroup / used).read_text()))
        except (OSError, ValueError):  # not there, or the word "max"
            continue
    return None


class MemoryWatch:
    """Remembers the highest memory use it saw, to tell an out-of-memory kill from any other SIGKILL."""

    def __init__(self, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc, self._cgroup = proc, cgroup
        self._kills = self._oom_kills()
        self._peak: Memory | None = None
        self.sample()

    def sample(self) -> None:
        """Look at the memory now."""
        now = read_memory(self._proc, self._cgroup)
        if now is not None and (
            self._peak is None or now.used / now.total > self._peak.used / self._peak.total
        ):
            self._peak = now

    def evidence(self) -> str | None:
        """Why a SIGKILL was likely the out-of-memory killer's; None if nothing says so."""
        self.sample()
        peak = self._peak
        used = f"host memory peaked at {peak.used / GIB:.1f} of {peak.total / GIB:.1f} GiB" if peak else ""
        if self._oom_kills() > self._kills:
            counted = "the kernel counted an out-of-memory kill meanwhile"
            return f"{used}, {counted}" if used else counted
        if peak is not None and peak.used >= _NEARLY * peak.total:
            return f"{used}, likely the out-of-memory killer"
        return None

    def _oom_kills(self) -> int:
        """How many processes the kernel has killed for want of memory, here or in this container."""
        count = 0
        for file in (self._proc / "vmstat", self._cgroup / "memory.events"):
            try:
                lines = file.read_text().splitlines()
            except OSError:
                continue
            count += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        return count
