"""What samples of a benchmark share: data, steps between barriers under any clocks, and what a rank tells."""

from __future__ import annotations

import gc
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Batches, Step
from gpt import SIZES

SEQUENCE = 256
MARK = "@"  # begins the line that a rank prints for whoever started it


def micro_batches(size: str, accumulate: int, rank: int) -> Callable[[], Batches]:
    """Called once a step: `accumulate` micro batches of one sequence, other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)

    def batches() -> Batches:
        ids = [
            torch.randint(SIZES[size][2], (1, SEQUENCE + 1), generator=generator) for _ in range(accumulate)
        ]
        return [(x[:, :-1], x[:, 1:].contiguous()) for x in ids]

    return batches


def time_steps(
    step: Step,
    batches: Callable[[], Batches],
    clocks: Mapping[str, Callable[[], float]],
    *,
    warmup: int,
    steps: int,
) -> dict[str, list[float]]:
    """What each clock went forward in each step after the warm-up, and "updates", what steps say of theirs.

    Collective. A clock is anything that counts up: seconds, bytes sent.
    """
    found: dict[str, list[float]] = {name: [] for name in (*clocks, "updates")}
    for number in range(warmup + steps):
        data = batches()
        dist.barrier()
        before = {name: clock() for name, clock in clocks.items()}
        update = step(data)
        dist.barrier()
        after = {name: clock() for name, clock in clocks.items()}
        if number < warmup:
            continue
        for name in clocks:
            found[name].append(after[name] - before[name])
        if update is not None:
            found["updates"].append(update)
    return found


def tell(figures: Mapping[str, Any]) -> None:
    print(MARK + json.dumps(figures), flush=True)


def told(lines: Iterable[str]) -> dict[str, Any] | None:
    """The last that a rank told among the lines it printed."""
    marked = [line for line in lines if line.startswith(MARK)]
    figures: dict[str, Any] | None = json.loads(marked[-1].removeprefix(MARK)) if marked else None
    return figures


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def live_tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (
            torch.Tensor,
            torch.nn.Parameter,
        ):  # wrappers hold plain tensors, counted by themselves
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {processor()}"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return "unknown processor"
    return "unknown processor"
