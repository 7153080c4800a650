"""Rates of every codec on this machine, beside a copy: what coding costs a rank in processor time.

python packages/ds-comm/benchmarks/codecs.py [--numel 16777216] [--rounds 11] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from ds_comm import Fp8, Int4, Int8, OneBit
from ds_comm.wire_rows import sum_rows
from ds_core.ground.codec import CastCodec
from ds_core.ground.wire import Codec

CODECS: dict[str, Codec] = {
    "bf16": CastCodec(torch.bfloat16),
    "int8": Int8(),
    "int8, stochastic": Int8(rounding="stochastic"),
    "int4": Int4(),
    "int4, asymmetric": Int4(symmetric=False),
    "e4m3": Fp8(),
    "one bit": OneBit(),
}
RANKS = 4


def median_ms(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of interleaved rounds, after one that nobody counts."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(codec: Codec, numel: int, rounds: int) -> dict[str, float]:
    src, out = torch.randn(1, numel), torch.empty(1, numel)
    chunk = numel // RANKS
    wire = torch.empty(1, codec.wire_bytes(numel), dtype=torch.uint8)
    rows = torch.empty(RANKS, codec.wire_bytes(chunk), dtype=torch.uint8)
    codec.encode(src.view(RANKS, chunk), rows)
    codec.encode(src, wire)
    room = torch.empty_like(src)
    return median_ms(
        {
            "copy": lambda: room.copy_(src),
            "encode": lambda: codec.encode(src, wire),
            "decode": lambda: codec.decode(wire, out),
            "sum": lambda: sum_rows(codec, rows, out[0, :chunk], scale=0.25),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="what coding costs a rank")
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table = Table(title=f"{given.numel} fp32, {given.threads} threads, median of {given.rounds}, ms")
    for column in ("codec", "bytes an element", "copy", "encode", "decode", f"sum of {RANKS} chunks"):
        table.add_column(column)
    for name, codec in CODECS.items():
        found = measure(codec, given.numel // (256 * RANKS) * 256 * RANKS, given.rounds)
        shown = [f"{found[what]:.2f}" for what in ("copy", "encode", "decode", "sum")]
        table.add_row(name, f"{codec.wire_bytes(given.numel) / given.numel:.3f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
