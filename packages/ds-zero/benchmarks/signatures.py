"""What signing every collective costs: steps with and without it, A B A B, and the time inside by itself.

`ds launch --nproc 2 signatures.py --size 30m`. Rank 0 prints JSON. Without signatures messages still carry a
number, since they need one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import torch
from gpt import SIZES, build

from ds_core.ground.flight import Flight, Lane
from ds_core.ground.mesh import Topology
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero

SEQUENCE = 256
_RECORD = Lane.record


class Inside:
    """Lane.record with a clock around it."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def install(self) -> None:
        def record(lane: Lane, op: str, tensor: torch.Tensor, about: str = "") -> Flight:
            began = time.perf_counter()
            flight = _RECORD(lane, op, tensor, about)
            self.seconds += time.perf_counter() - began
            self.calls += 1
            return flight

        Lane.record = record  # type: ignore[method-assign]


def without(lane: Lane, op: str, tensor: torch.Tensor, about: str = "") -> Any:
    lane.number += 1
    return Flight(lane.number, "", tensor.dtype, 0, "", 0, lane.number, ())


def main() -> None:
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
            Lane.record = _RECORD if kind == "with" else without  # type: ignore[method-assign]
            times[kind].append(step())
    inside = Inside()
    inside.install()
    clocked = [step() for _ in range(5)]
    if rank == 0:
        median = {kind: statistics.median(found) for kind, found in times.items()}
        print(
            json.dumps(
                {
                    "size": args.size,
                    "stage": args.stage,
                    "pairs": args.pairs,
                    "step_ms": {kind: round(1e3 * value, 2) for kind, value in median.items()},
                    "ratio": round(median["with"] / median["without"], 4),
                    "fastest_ratio": round(min(times["with"]) / min(times["without"]), 4),
                    "collectives_per_step": inside.calls // 5,
                    "microseconds_each": round(1e6 * inside.seconds / inside.calls, 2),
                    "percent_of_step_inside": round(100 * inside.seconds / sum(clocked), 3),
                    "load": os.getloadavg()[0],
                    "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
                    "torch": torch.__version__,
                }
            )
        )


if __name__ == "__main__":
    main()
