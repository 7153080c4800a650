"""What the communication log costs: training steps with it and without, in turns, on the same ranks.

    ds launch --nproc 2 packages/ds-comm/benchmarks/log_cost.py --width 512 --layers 6 --steps 40

Stage 0 with several units, so that reductions overlap with the backward. Prints the medians of a step's
wall time and of its CPU time on this rank's main thread, and what the log adds to each in percent. The
parameters of both are compared at the end, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from ds_comm import CommLog
from ds_core import Engine, ReplicatedOwner, ShardedOptimizer, Topology


def build(width: int, layers: int) -> tuple[nn.Module, Engine]:
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True) for _ in range(layers)]
    model = nn.Sequential(*blocks)
    owner = ReplicatedOwner(model, Topology().build(), bucket_numel=2_000_000)
    return model, Engine(
        model, owner, ShardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), owner)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    twins = {"off": build(args.width, args.layers), "on": build(args.width, args.layers)}
    log = CommLog(twins["on"][1].owner.mesh)
    wall: dict[str, list[float]] = {"off": [], "on": []}
    cpu: dict[str, list[float]] = {"off": [], "on": []}
    rank = log.rank
    for step in range(args.steps + 3):
        for name in ("off", "on") if step % 2 else ("on", "off"):
            model, engine = twins[name]
            x = torch.randn(
                1, args.tokens, args.width, generator=torch.Generator().manual_seed(step * 64 + rank)
            )
            engine.owner.mesh.barrier()
            begin = time.perf_counter(), time.thread_time()
            engine.backward(model(x.to(engine.owner.device)).square().mean())
            engine.step()
            engine.owner.mesh.accelerator.synchronize()
            if step >= 3:
                wall[name].append(time.perf_counter() - begin[0])
                cpu[name].append(time.thread_time() - begin[1])
    pairs = zip(twins["off"][0].parameters(), twins["on"][0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), "the log changed the training"
    if rank == 0:
        calls = sum(row.calls for row in log.steps()) / max(1, len({row.step for row in log.steps()}))
        print(
            f"{sum(p.numel() for p in twins['on'][0].parameters()):,} parameters,"
            f" {calls:.0f} collectives a step"
        )
        for what, spent in (("wall", wall), ("CPU", cpu)):
            off, on = (1e3 * statistics.median(spent[name]) for name in ("off", "on"))
            differ = [b - a for a, b in zip(spent["off"], spent["on"], strict=True)]
            share = 100 * 1e3 * statistics.median(differ) / off
            print(f"{what:5} off {off:9.3f} ms, on {on:9.3f} ms, median difference {share:+.2f} %")
        print(log.summary())


if __name__ == "__main__":
    main()
