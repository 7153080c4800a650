"""The optimizer phase with all state on a disk, beside fio moving the same bytes, and beside the prediction.

Rounds are interleaved (fio, then ours), so that what else the machine and its disk do disturbs both alike.
`python update.py --disk FOLDER`; prints JSON lines, `--write` appends them to results/update.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.optim import ShardedOptimizer
from ds_kernels import FusedAdamW
from ds_offload import TieredStore, measure_bandwidths, predict_update

WIDTH = 2048  # of the square matrices that make up the model
HERE = Path(__file__).parent


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = list(run(args))
    for row in rows:
        print(json.dumps(row))
    if args.write:
        with (HERE / "results" / "update.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for each depth and size of chunks."""
    for depth in args.depth:
        for chunk in args.chunk_numel:
            yield one(args, depth, chunk)


def one(args: argparse.Namespace, depth: int, chunk_numel: int) -> dict[str, Any]:
    store = TieredStore(
        nvme=args.disk, grads="nvme", masters="nvme", moments="nvme", depth=depth, chunk_numel=chunk_numel
    )
    layers = max(1, args.numel // (WIDTH * WIDTH))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    optimizer = FusedAdamW(model.parameters(), lr=1e-4)
    owner = ReplicatedOwner(model, dtype=torch.bfloat16, store=store)
    sharded = ShardedOptimizer(optimizer, owner)
    store_volume = store.volume
    assert store_volume is not None
    assert sharded.elsewhere is not None
    ours: list[float] = []
    fio_seconds: list[float] = []
    moved = (0, 0)
    for round_number in range(args.rounds + 1):
        model(torch.randn(1, WIDTH, dtype=torch.bfloat16)).square().mean().backward()
        owner.drain()
        before = (store_volume.read_bytes, store_volume.written_bytes)
        began = time.perf_counter()
        sharded.elsewhere.run()
        took = time.perf_counter() - began
        moved = (store_volume.read_bytes - before[0], store_volume.written_bytes - before[1])
        optimizer.zero_grad()
        if round_number:  # the first makes the moments
            ours.append(took)
            fio_seconds.append(fio(args, *moved))
    bandwidths = measure_bandwidths(
        store_volume, lambda params: FusedAdamW(params, lr=1e-4), max_bytes=256 << 20, seconds=1.0
    )
    numel = layers * WIDTH * WIDTH
    chunks = len(sharded.elsewhere.plan.chunks)
    predicted = predict_update(numel, *moved, bandwidths, chunks=chunks)
    store.close()
    known = [seconds for seconds in fio_seconds if seconds > 0]
    return {
        "case": "update",
        "depth": depth,
        "chunk_numel": chunk_numel,
        "numel": numel,
        "bytes": sum(moved),
        "ours_s": rounded(ours),
        "ours_GBps": round(sum(moved) / statistics.median(ours) / 1e9, 2),
        "fio_s": rounded(known) if known else "no fio on PATH",
        "of_fio": round(statistics.median(f / o for f, o in zip(known, ours, strict=True)), 3)
        if known
        else None,
        "predicted_s": round(predicted, 3),
        "predicted_over_measured": round(predicted / statistics.median(ours), 3),
        "bandwidths": str(bandwidths),
        **machine(args),
    }


def fio(args: argparse.Namespace, read: int, written: int) -> float:
    """Seconds in which fio reads and writes as many bytes at once, at the same block size and queue depth."""
    if shutil.which("fio") is None:
        return 0.0
    path = Path(args.disk) / f"fio-{os.getpid()}.bin"
    block, depth = 1 << 20, 64
    size = max(read, written) // block * block
    command = [
        *(
            "fio",
            f"--filename={path}",
            f"--bs={block}",
            "--direct=1",
            "--ioengine=io_uring",
            f"--size={size}",
        ),
        *(f"--iodepth={depth}", "--output-format=json", "--thread", "--group_reporting", "--fallocate=posix"),
        *("--name=both", f"--io_size={read + written}"),
        *("--rw=rw", f"--rwmixread={round(100 * read / (read + written))}"),
    ]
    large = {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }  # its buffers in large pages, as ours are
    try:
        lay_out = [*command[:-2], "--rw=write", f"--size={size}"]
        subprocess.run(lay_out, check=True, capture_output=True, env=large)
        told = json.loads(subprocess.run(command, check=True, capture_output=True, env=large).stdout)
    finally:
        path.unlink(missing_ok=True)
    job = told["jobs"][0]
    return (
        max(job["read"]["runtime"], job["write"]["runtime"])
        / 1000
        * (read + written)
        / (job["read"]["io_bytes"] + job["write"]["io_bytes"])
    )


def rounded(values: list[float]) -> dict[str, float]:
    return {
        "best": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "worst": round(max(values), 3),
    }


def machine(args: argparse.Namespace) -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "date": str(date.today()), "cpu": model, "cores": os.cpu_count(), "threads": args.threads,
        "load": round(os.getloadavg()[0], 1), "torch": torch.__version__, "kernel": platform.release(),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", default=".", help="folder on the disk")
    parser.add_argument("--numel", type=int, default=100_000_000, help="elements of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--chunk-numel", type=int, nargs="+", default=[1 << 22])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="append to results/update.jsonl")
    args = parser.parse_args()
    if args.numel < WIDTH * WIDTH or args.rounds < 1:
        sys.exit(f"--numel must be at least {WIDTH * WIDTH}, --rounds at least 1")
    return args


if __name__ == "__main__":
    main()
