"""What looking costs: a training step alone, under Timeline, and after it was taken away again.

    python packages/ds-core/benchmarks/seeing.py [--rounds 200] [--out results.json]
    ds launch --nproc 2 packages/ds-core/benchmarks/seeing.py

Steps of the three kinds take turns in every round, in a random order that all ranks share, so that what else
the machine does falls on all alike, and the thread's own CPU time is what counts: on the CPU it does all the
work. The cost is the median over rounds of the difference within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_core import Engine, Mesh, ReplicatedOwner, ShardedOptimizer, Timeline, Topology

SIZES = {"0.1M": (128, 4, 16), "2M": (512, 8, 32), "8M": (1024, 8, 64)}  # width, depth, rows
KINDS = ("alone", "timeline", "after")


def build(mesh: Mesh, width: int, depth: int) -> Engine:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    owner = ReplicatedOwner(model, mesh)
    return Engine(model, owner, ShardedOptimizer(optimizer, owner))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def measure(engine: Engine, x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of each kind, and what the other two cost on top of the first."""
    order, times = random.Random(0), {kind: [] for kind in KINDS}  # type: dict[str, list[float]]
    timeline = Timeline(engine)
    for _ in range(rounds):
        for kind in order.sample(KINDS, len(KINDS)):
            with timeline if kind == "timeline" else contextlib.nullcontext():
                engine.train_batch([x], loss_fn)  # the first after a change has cold caches
                begin = time.thread_time()
                engine.train_batch([x], loss_fn)
                times[kind].append((time.thread_time() - begin) * 1e3)
    found = {f"{kind}_ms": statistics.median(times[kind]) for kind in KINDS}
    for kind in KINDS[1:]:
        differences = [a - b for a, b in zip(times[kind], times["alone"], strict=True)]
        found[f"{kind}_cost_ms"] = statistics.median(differences)
        found[f"{kind}_cost_percent"] = 100 * found[f"{kind}_cost_ms"] / found["alone_ms"]
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Measure every size and print one JSON object on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mesh = Topology().build()
    results = {}
    for name, (width, depth, rows) in SIZES.items():
        engine = build(mesh, width, depth)
        results[name] = measure(engine, torch.randn(rows, width), args.rounds)
    if mesh.rank("dp_shard") == 0:
        text = json.dumps({"ranks": mesh.world, "rounds": args.rounds, "sizes": results}, indent=2) + "\n"
        sys.stdout.write(text)
        if args.out is not None:
            args.out.write_text(text)


if __name__ == "__main__":
    main()
