"""How fast this machine's tiers are, measured in a second, and the step time that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from ds_offload.slabs import Slabs
from ds_offload.volume import Volume

_MIB = 1 << 20
_NUMEL = 1 << 20  # of the parameter with which an optimizer is timed
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes per second between tiers, and elements per second of the optimizer; None: not measured.

    A copy of n bytes in host memory counts n. `mixed` is of reads and writes of equal bytes at once, both
    counted.
    """

    host_copy: float  # by all threads
    host_copy_one: float  # by one thread
    read: float | None = None
    write: float | None = None
    mixed: float | None = None
    to_device: float | None = None
    to_host: float | None = None
    update: float | None = None  # elements; memory in host

    def __str__(self) -> str:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        said = [
            f"{name.replace('_', ' ')} {value / 1e9:.2f} {'G elements/s' if name == 'update' else 'GB/s'}"
            for name, value in found.items()
            if value is not None
        ]
        return "measured: " + ", ".join(said)


def measure_bandwidths(
    volume: Volume | None = None,
    make_optimizer: MakeOptimizer | None = None,
    *,
    device: torch.device | None = None,
    seconds: float = 0.3,
    max_bytes: int = 64 * _MIB,
) -> Bandwidths:
    """Measure what there is: host memory always, the rest as far as it is given.

    `make_optimizer` takes a list of fp32 parameters. Each figure takes about `seconds`, and memory and disk
    of at most `max_bytes`, which are given back; nothing is remembered. It is the median of passes after a
    first one that does not count. The volume is used as it is, with its own queue depth and block size.
    Raises: ValueError; OSError when the disk is full or fails.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: allowed is what is above 0; 0.3 is enough as a rule")
    if max_bytes < _MIB:
        raise ValueError(f"max_bytes={max_bytes!r}: allowed are numbers from {_MIB}, a block of a disk's")
    clock = _Clock(seconds)
    disk = _disk(volume, clock, max_bytes) if volume is not None else {}
    wires = _wires(device, clock, max_bytes) if device is not None and device.type != "cpu" else {}
    update = _update(make_optimizer, clock, max_bytes) if make_optimizer is not None else None
    return Bandwidths(**_host(clock, max_bytes), **disk, **wires, update=update)


class _Clock:
    """Passes of some work until the time is over, and the median of their seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time(self, work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> float:
        end, took = time.perf_counter() + self._seconds, list[float]()
        while not took or time.perf_counter() < end or len(took) < 2:
            begin = time.perf_counter()
            work()
            settle()
            took.append(time.perf_counter() - begin)
        passes = sorted(took[1:])  # the first one touches memory and fills caches
        return passes[len(passes) // 2]


def _host(clock: _Clock, max_bytes: int) -> dict[str, float]:
    """Between two buffers of half the bytes each, larger than caches where `max_bytes` allows it."""
    size = max_bytes // 2
    source, target = torch.ones(2, size, dtype=torch.uint8).unbind()
    found = {"host_copy": size / clock.time(lambda: target.copy_(source))}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found["host_copy_one"] = size / clock.time(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)
    return found


def _disk(volume: Volume, clock: _Clock, max_bytes: int) -> dict[str, float]:
    """Half of the bytes are read while the other half is written, as an optimizer phase does."""
    size = max_bytes // 2 // _MIB * _MIB or _MIB // 2
    slabs = Slabs(keep_bytes=0)
    first, second = slabs.lease(size).fill_(1), slabs.lease(size).fill_(2)
    one, two = volume.allocate(size), None
    try:
        two = volume.allocate(size)

        def both() -> None:
            requests = [volume.read(one.offset, first), volume.write(two.offset, second)]
            for request in requests:
                request.result()

        volume.write(two.offset, second).result()  # blocks of the file that were never written cost more
        return {
            "write": size / clock.time(lambda: volume.write(one.offset, first).result()),
            "read": size / clock.time(lambda: volume.read(one.offset, first).result()),
            "mixed": 2 * size / clock.time(both),
        }
    finally:
        volume.io.wait_all()
        for extent in (one, two):
            if extent is not None:
                volume.free(extent)


def _wires(device: torch.device, clock: _Clock, max_bytes: int) -> dict[str, float]:
    size = max_bytes // 2
    host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def settle() -> None:
        torch.accelerator.synchronize(device)

    return {
        "to_device": size / clock.time(lambda: there.copy_(host, non_blocking=True), settle),
        "to_host": size / clock.time(lambda: host.copy_(there, non_blocking=True), settle),
    }


def _update(make: MakeOptimizer, clock: _Clock, max_bytes: int) -> float:
    """Elements per second of one parameter; with gradient and two moments it takes 16 bytes an element."""
    numel = min(_NUMEL, max_bytes // 16)
    param = nn.Parameter(torch.full((numel,), 0.5))
    param.grad = torch.full((numel,), 1e-3)
    optimizer = make([param])
    return numel / clock.time(optimizer.step)


def predict_update(
    numel: int, read_bytes: int, write_bytes: int, bandwidths: Bandwidths, *, chunks: int
) -> float:
    """Seconds of the optimizer phase: fetch of chunk i+1, update of i and flush of i-1 at the same time.

    The first fetch and the last flush have nobody to hide behind. Between them a chunk takes as long as the
    slower of its update and of its share of the disk, which reads and writes at once.
    Raises: ValueError if a figure is missing or a number cannot be.
    """
    for name, value in (("numel", numel), ("read_bytes", read_bytes), ("write_bytes", write_bytes)):
        if value < 0:
            raise ValueError(f"{name}={value!r}: allowed are numbers from 0")
    if chunks < 1:
        raise ValueError(f"chunks={chunks!r}: allowed are whole numbers from 1")
    fetch = _seconds(read_bytes / chunks, bandwidths.read, "read")
    flush = _seconds(write_bytes / chunks, bandwidths.write, "write")
    update = _seconds(numel / chunks, bandwidths.update, "update")
    return predict_step([fetch] * chunks, [update] * chunks, [flush] * chunks, _duplex(bandwidths))


def predict_step(
    fetches: Sequence[float], updates: Sequence[float], flushes: Sequence[float], duplex: float = 1.0
) -> float:
    """Seconds of `fetch i+1 | update i | flush i-1` for chunks of any size.

    Given are the seconds of each part if it ran alone. In each slot fetch and flush share the disk: together
    they take the sum of their times over `duplex`, but no less than the longer one; 1 is a disk that does
    one thing at a time, 2 one that reads while it writes for nothing.
    Raises: ValueError for lists of different lengths.
    """
    if not len(fetches) == len(updates) == len(flushes):
        raise ValueError(
            f"{len(fetches)} fetches, {len(updates)} updates, {len(flushes)} flushes: one of each for a chunk"
        )
    total, count = 0.0, len(updates)
    for slot in range(-1, count + 1):  # before the first update, during each, and after the last
        fetch = fetches[slot + 1] if slot + 1 < count else 0.0
        flush = flushes[slot - 1] if slot >= 1 else 0.0
        update = updates[slot] if 0 <= slot < count else 0.0
        total += max(update, fetch, flush, (fetch + flush) / duplex)
    return total


def _duplex(bandwidths: Bandwidths) -> float:
    """How much faster reads and writes of equal bytes are at once than one after the other."""
    read, write, mixed = bandwidths.read, bandwidths.write, bandwidths.mixed
    if read is None or write is None or mixed is None:
        return 1.0
    return mixed * (1 / read + 1 / write) / 2


def _seconds(amount: float, rate: float | None, name: str) -> float:
    if not amount:
        return 0.0
    if rate is None:
        raise ValueError(f"bandwidths.{name} was not measured: give measure_bandwidths what it needs for it")
    return amount / rate
