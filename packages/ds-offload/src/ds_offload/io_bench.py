"""Finds the settings of `AsyncIO` that suit a disk best, and keeps them in a JSON file."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_kernels.aio import AioFuture, AsyncIO, describe
from ds_offload.slabs import Slabs
from ds_offload.volume import Extent, Volume

FILE = "ds_io.json"
OPS: tuple[Literal["read", "write"], ...] = ("write", "read")
_FORMAT = 1
_TILE = 16 << 20  # of the noise that fills the test file
_REQUEST = 4 << 20  # the least bytes of a request: smaller ones measure Python
_BETTER, _FINALISTS = 4, 3  # of how many settings one is tried again, and how many are in the last round
_SLICES = (1, 2, 4)  # per setting and direction, by round


@dataclass(frozen=True, slots=True)
class IoSetting:
    """What `AsyncIO(**asdict(setting))` takes."""

    engine: str
    block_size: int
    queue_depth: int
    threads: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is tried: every combination that the engines take and the file has bytes for."""

    engines: tuple[str, ...] = ()  # empty: those that this machine has, Python's only if it is the one
    block_sizes: tuple[int, ...] = (1 << 20, 256 << 10, 4 << 20)
    queue_depths: tuple[int, ...] = (64, 8, 32, 128)
    threads: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        for name in ("block_sizes", "queue_depths", "threads"):
            values = getattr(self, name)
            if not values or any(not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f"{name}={values}: allowed are whole numbers from 1, at least one")


@dataclass(slots=True)
class IoResult:
    """Bytes per second of one setting, a sample for each time it was tried."""

    setting: IoSetting
    samples: dict[str, list[float]] = field(default_factory=lambda: {op: [] for op in OPS})

    def rate(self, op: str) -> float:
        """The median of its samples; 0 if it was not tried."""
        return statistics.median(self.samples[op]) if self.samples[op] else 0.0

    @property
    def score(self) -> float:
        """Bytes per second of writing and then reading the same bytes, both counted."""
        if not all(self.samples.values()):
            return 0.0
        return 2 / (1 / self.rate("read") + 1 / self.rate("write"))


@dataclass(frozen=True, slots=True)
class IoReport:
    """All that was tried, what got farthest first and of that the best."""

    folder: str
    direct: bool  # past the page cache?
    why: str
    num_bytes: int
    results: tuple[IoResult, ...]
    skipped: tuple[IoSetting, ...]  # the time was over before

    @property
    def best(self) -> IoResult:
        return self.results[0]


def plan_sweep(sweep: Sweep, num_bytes: int, engines: Sequence[str]) -> list[IoSetting]:
    """Every setting to try, the likeliest first, so that a sweep that is cut short has tried those.

    Threads with plain system calls have a block each, and no depth beside. More than half of the file is
    never under way. Raises: ValueError if nothing is left.
    """
    found = list[IoSetting]()
    grid = itertools.product(sweep.queue_depths, sweep.block_sizes, sweep.threads)
    for (depth, block, threads), engine in itertools.product(grid, sweep.engines or engines):
        if engine in ("threads", "python"):
            setting = IoSetting(engine, block, depth, depth)
            possible = threads == sweep.threads[0] and depth <= 32
        else:
            setting = IoSetting(engine, block, depth, threads)
            possible = threads <= depth
        if possible and 2 * block * setting.queue_depth <= num_bytes:
            found.append(setting)
    if not found:
        least = 2 * min(sweep.block_sizes) * min(sweep.queue_depths)
        raise ValueError(
            f"{num_bytes} bytes are too few for any setting: give {least} or more, or smaller blocks"
        )
    return found


def bench_io(
    folder: str | os.PathLike[str],
    *,
    seconds: float = 30.0,
    num_bytes: int = 256 << 20,
    sweep: Sweep | None = None,
    told: Callable[[float], None] = lambda share: None,
) -> IoReport:
    """Try settings on a file in `folder` for about `seconds`.

    Three rounds: every setting once, the better quarter again, the best three again; which direction and
    which setting comes first changes, so that a disk that remembers and other users disturb all alike. The
    file has no name: nothing is left, however this ends. `told` hears which share is done.
    Raises: ValueError; OSError when the disk fails.
    """
    sweep = sweep or Sweep()
    check_bench(folder, seconds, num_bytes)
    settings = plan_sweep(sweep, num_bytes, usable_engines())
    counts = (len(settings), -(-len(settings) // _BETTER), min(len(settings), _FINALISTS))
    slices = len(OPS) * sum(count * tries for count, tries in zip(counts, _SLICES, strict=True))
    with bench_file(folder, num_bytes) as (volume, extent, memory):
        runner = _Runner(volume, extent, memory, seconds / slices, lambda done: told(done / slices))
        results = [IoResult(setting) for setting in settings]
        end = time.perf_counter()
        for count, tries in zip(counts, _SLICES, strict=True):
            end += seconds * len(OPS) * count * tries / slices
            for _ in range(tries):
                runner.round(results[:count], end)
            results[:count] = sorted(results[:count], key=lambda result: -result.score)
        told(1.0)
        tried = tuple(result for result in results if result.score)
        skipped = tuple(result.setting for result in results if not result.score)
        return IoReport(volume.folder, volume.file.direct, volume.file.why, num_bytes, tried, skipped)


def check_bench(folder: str | os.PathLike[str], seconds: float, num_bytes: int) -> None:
    """Can there be a run? Raises: ValueError."""
    path = Path(folder)
    if not path.exists():
        raise ValueError(f"{path}: no such folder; make it, or give one that is on the disk to measure")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: allowed are folders; give the one it is in")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: allowed are numbers above 0; 30 is enough as a rule")
    if num_bytes < 2 * _REQUEST:
        raise ValueError(f"bytes={num_bytes}: allowed are numbers from {2 * _REQUEST}; the default is 256M")
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise ValueError(
            f"{path}: {free} bytes are free, the test file takes {num_bytes}; give fewer, or make room"
        )


def usable_engines() -> tuple[str, ...]:
    """The engines that this machine has, the likeliest first; Python's only if there is no other."""
    there = [row.engine for row in describe() if row.there]
    return tuple(name for name in there if name != "python") or ("python",)


@contextmanager
def bench_file(folder: str | os.PathLike[str], num_bytes: int) -> Iterator[tuple[Volume, Extent, Tensor]]:
    """A file of `num_bytes` that were written once, and as much memory."""
    volume = Volume(folder)
    try:
        extent = volume.allocate(num_bytes)
        memory = Slabs(keep_bytes=0).lease(num_bytes)
        noise = _noise(min(_TILE, num_bytes))  # some disks write zeros for nothing
        for begin in range(0, num_bytes, _TILE):
            tile = memory[begin : begin + _TILE]
            tile.copy_(noise[: tile.numel()])
        volume.write(extent.offset, memory).result()
        yield volume, extent, memory
    finally:
        volume.close()


def _noise(num_bytes: int) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=chance)


class _Runner:
    """Takes samples of `slice_s` seconds each, and tells how many it took."""

    def __init__(
        self, volume: Volume, extent: Extent, memory: Tensor, slice_s: float, told: Callable[[int], None]
    ) -> None:
        self._volume, self._extent, self._memory = volume, extent, memory
        self._slice_s, self._told = slice_s, told
        self._done = self._turn = 0

    def round(self, results: Sequence[IoResult], end: float) -> None:
        """Each result gets a sample more in each direction, until the time is `end`."""
        start = self._turn % len(results)
        self._turn += 1
        for result in [*results[start:], *results[:start]]:
            if self._done and time.perf_counter() >= end:
                return  # something is tried, however slow the disk
            with AsyncIO(**asdict(result.setting)) as io:
                for op in OPS:
                    result.samples[op].append(self._sample(io, result.setting, op))
                    self._done += 1
                    self._told(self._done)

    def _sample(self, io: AsyncIO, setting: IoSetting, op: str) -> float:
        """Bytes per second of requests one after the other, with enough of them under way for the depth."""
        begin_at, size = self._extent.offset, max(_REQUEST, setting.block_size)
        places = self._memory.nbytes // size
        most = max(1, min(places // 2, -(-2 * setting.block_size * setting.queue_depth // size)))
        under_way, moved = deque[AioFuture](), 0
        move: Callable[..., AioFuture] = getattr(io, op)
        begin = time.perf_counter()
        for number in itertools.count():
            if number and time.perf_counter() - begin >= self._slice_s:
                break
            place = number % places * size
            under_way.append(move(self._volume.file, self._memory[place : place + size], begin_at + place))
            if len(under_way) > most:
                moved += under_way.popleft().result()
        moved += sum(request.result() for request in under_way)
        return moved / (time.perf_counter() - begin)


def write_settings(report: IoReport, path: str | os.PathLike[str]) -> None:
    """Keep the best settings, and the figures of all, as JSON; a file that is there is replaced whole."""
    rows = [
        asdict(result.setting)
        | {op: round(result.rate(op)) for op in OPS}
        | {"tries": len(result.samples[OPS[0]])}
        for result in report.results
    ]
    document = {
        "format": _FORMAT,
        "folder": report.folder,
        "direct": report.direct,
        "bytes": report.num_bytes,
        "best": asdict(report.best.setting),
        "bytes_per_second": {op: round(report.best.rate(op)) for op in OPS},
        "tried": rows,
    }
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def io_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The best settings that `ds io bench` found, for `AsyncIO(**settings)`; `path` is its file or folder.

    Raises: ValueError for a file that is not one of ours, or that names an engine this machine lacks.
    """
    file = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(f"{file}: no such file; `ds io bench {Path(path)}` makes it")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        best = IoSetting(**document["best"])
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is not a file of `ds io bench` ({error}); run it again") from error
    rows = {row.engine: row for row in describe()}
    if best.engine not in rows or not rows[best.engine].there:
        here = ", ".join(usable_engines())
        raise ValueError(
            f"{file}: engine {best.engine!r} is not here; there are {here}; run `ds io bench` again"
        )
    return asdict(best)
