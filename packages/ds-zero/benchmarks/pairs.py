"""Steps of a GPT with and without one part of the runtime, A B B A, and the time inside of that part."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpt import SIZES, build

from ds_core.ground.mesh import Topology
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero

SEQUENCE = 256
CLOCKED = 5  # steps


class Inside:
    """Functions with one clock around them."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - began
            self.calls += 1
            return result

        return clocked


def compare(
    calls: str, kept: Callable[..., Any], without: Callable[..., Any], put: Callable[[Any], None]
) -> None:
    """`put` installs one of three: `kept`, `without`, and `kept` with a clock. Rank 0 prints JSON.

    `calls` is what a call of it is called in the JSON. Takes --size, --stage and --pairs.
    """
    options = argparse.ArgumentParser()
    options.add_argument("--size", choices=sorted(SIZES), default="30m")
    options.add_argument("--stage", type=int, default=3)
    options.add_argument("--pairs", type=int, default=12)
    args = options.parse_args()
    torch.set_num_threads(1)
    rank, mesh = int(os.environ["RANK"]), Topology().build()
    model = build(args.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    owner = Zero(stage=args.stage, dtype="bfloat16").shard(model, mesh)
    ShardedOptimizer(optimizer, owner)
    ids = torch.randint(0, SIZES[args.size][2], (1, SEQUENCE + 1))

    def step() -> float:
        mesh.barrier()
        began = time.perf_counter()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    times: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(args.pairs):
        for kind in ("with", "without") if pair % 2 else ("without", "with"):
            put(kept if kind == "with" else without)
            times[kind].append(step())
    inside = Inside()
    put(inside.wrap(kept))
    clocked = [step() for _ in range(CLOCKED)]
    if rank == 0:
        median = {kind: statistics.median(found) for kind, found in times.items()}
        found = {
            "size": args.size,
            "stage": args.stage,
            "pairs": args.pairs,
            "step_ms": {kind: round(1e3 * value, 2) for kind, value in median.items()},
            "ratio": round(median["with"] / median["without"], 4),
            "fastest_ratio": round(min(times["with"]) / min(times["without"]), 4),
            f"{calls}_per_step": inside.calls // CLOCKED,
            "microseconds_each": round(1e6 * inside.seconds / inside.calls, 2),
            "percent_of_step_inside": round(100 * inside.seconds / sum(clocked), 3),
            "modules": sum(1 for _ in model.modules()),
            "load": os.getloadavg()[0],
            "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
            "torch": torch.__version__,
        }
        print(json.dumps(found))
