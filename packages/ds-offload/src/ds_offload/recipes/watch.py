"""Where the bytes are while a job runs: memory, tiers and disk traffic, sampled on a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ds_offload.volume import Volume

_STATUS = Path("/proc/self/status")


class Watched(Protocol):
    """What is asked of the store."""

    def bytes_by_tier(self) -> dict[str, int]: ...

    volume: Volume | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. Bytes; `read` and `written` count from the start."""

    seconds: float
    resident: int
    tiers: Mapping[str, int]
    read: int
    written: int


def memory() -> dict[str, int]:
    """This process's memory in bytes by the kernel's names: VmRSS now, VmHWM at most so far."""
    found = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


@dataclass(slots=True)
class Watch:
    """Samples every `every` seconds from entering to leaving."""

    store: Watched
    every: float = 0.25
    samples: list[Sample] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="ds-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        while True:
            disk = self.store.volume
            read, written = (disk.read_bytes, disk.written_bytes) if disk is not None else (0, 0)
            now = time.perf_counter() - began
            tiers = self.store.bytes_by_tier()
            self.samples.append(Sample(now, memory()["VmRSS"], tiers, read, written))
            if self._done.wait(self.every):
                return
