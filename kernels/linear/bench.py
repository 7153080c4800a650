"""Linear layers with few rows on this machine: bf16, torch's packed ops, torchao and ours, interleaved.

A contender multiplies x by 12 weights of 2048 x 2048: 96 MB of bf16, more than the caches hold; int4 is 24,
which a large third-level cache may keep. The probe reads as many bytes as bf16 weights have.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_kernels import PackedLinear, linear_bf16, load, pack_linear, quant_linear

# The limit: every thread reads its part of memory in one stream.
PROBE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static uint64_t* memory;
extern "C" void probe_open(int64_t bytes) {
  memory = (uint64_t*)aligned_alloc(64, bytes);
  for (int64_t i = 0; i < bytes / 8; ++i) memory[i] = (uint64_t)i * 0x9e3779b97f4a7c15u;
}
extern "C" uint64_t probe_run(int64_t bytes, int threads) {
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(^ : all)
  for (int64_t k = 0; k < bytes / 8; k += 32768) {
    const int64_t end = k + 32768 < bytes / 8 ? k + 32768 : bytes / 8;
    uint64_t mine = 0;
    for (int64_t i = k; i < end; ++i) mine ^= memory[i];
    all ^= mine;
  }
  return all;
}
"""


class Contender(NamedTuple):
    """A pass through all layers, and the bytes of weights, scales and zero points that it must read."""

    run: Callable[[], Any]
    nbytes: int


class Sample(NamedTuple):
    """One timed pass: wall and own processor seconds."""

    wall: float
    cpu: float


def weights(layers: int, size: int) -> list[Tensor]:
    """Random bf16 weights, of the size that initialisation gives."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, size, generator=generator).mul_(size**-0.5).bfloat16() for _ in range(layers)]


def over(layers: Sequence[Any], call: Callable[[Any], Tensor]) -> Contender:
    """A pass of `call` over every layer, which is a tensor or a tuple of tensors."""
    leaves = [t for layer in layers for t in (layer if isinstance(layer, tuple) else (layer,))]
    return Contender(lambda: [call(layer) for layer in layers], sum(t.nbytes for t in leaves))


def ours(dense: list[Tensor], x: Tensor) -> dict[str, Contender]:
    """Every format of ours."""
    found = {"ours bf16": over(dense, lambda w: linear_bf16(x, w))}
    settings: dict[str, dict[str, Any]] = {
        "ours int8": {"bits": 8},
        "ours int8, groups of 128": {"bits": 8, "group": 128},
        "ours fp6": {"bits": 6},
        "ours int4": {"bits": 4, "group": 0},
        "ours int4, groups of 128": {"bits": 4},
        "ours int4, groups of 128, asymmetric": {"bits": 4, "symmetric": False},
    }
    for name, how in settings.items():
        packed = [pack_linear(w, **how) for w in dense]
        nbytes = sum(p.nbytes for p in packed)
        found[name] = Contender(partial(_through, x, packed), nbytes)
    return found


def _through(x: Tensor, layers: list[PackedLinear]) -> None:
    for layer in layers:
        quant_linear(x, layer)


def torchs(dense: list[Tensor], x: Tensor) -> dict[str, Contender]:
    """torch's own: plain layers and the packed ops (not dynamic int8: it rounds x too, another product)."""
    found = {"torch bf16": over(dense, lambda w: F.linear(x, w))}
    int8 = []
    for w in dense:
        packed = pack_linear(w, 8)
        int8.append((packed.codes, packed.scales[:, 0].bfloat16()))
    found["torch int8pack"] = over(int8, lambda w: torch._weight_int8pack_mm(x, *w))
    int4 = []
    for w in dense:
        codes = torch.randint(0, 16, w.shape, dtype=torch.int32)
        scales_and_zeros = torch.full((w.shape[1] // 128, w.shape[0], 2), 0.01, dtype=torch.bfloat16)
        int4.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales_and_zeros))
    pack = torch.ops.aten._weight_int4pack_mm_for_cpu
    found["torch int4pack, groups of 128"] = over(int4, lambda w: pack(x, w[0], 128, w[1]))
    return found


def torchaos(dense: list[Tensor], x: Tensor, compiled: bool) -> dict[str, Contender]:
    """torchao's int8 weight-only layers, eager and (if asked, a minute) compiled."""
    if importlib.util.find_spec("torchao") is None:
        print("torchao: skipped, because `torchao` is not installed", file=sys.stderr)
        return {}
    quantization = importlib.import_module("torchao.quantization")
    layers = []
    for w in dense:
        layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(w, requires_grad=False)
        model = nn.Sequential(layer)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        layers.append(model)
    nbytes = sum(w.numel() + 4 * w.shape[0] for w in dense)
    found = {"torchao int8": Contender(lambda: [layer(x) for layer in layers], nbytes)}
    if compiled:
        fast = [torch.compile(layer, mode="max-autotune") for layer in layers]
        found["torchao int8, compiled"] = Contender(lambda: [layer(x) for layer in fast], nbytes)
    return found


def probe(nbytes: int, threads: int) -> Contender:
    """The bandwidth probe, compiled here."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        handle = ctypes.CDLL(str(library))
    handle.probe_open(ctypes.c_int64(nbytes))
    return Contender(lambda: handle.probe_run(ctypes.c_int64(nbytes), threads), nbytes)


def measure(found: dict[str, Contender], rounds: int) -> dict[str, list[Sample]]:
    """The samples of every contender, interleaved, after two rounds to warm up."""
    samples: dict[str, list[Sample]] = {name: [] for name in found}
    for round_ in range(-2, rounds):
        for name, contender in found.items():
            cpu, start = time.process_time(), time.perf_counter()
            contender.run()
            sample = Sample(time.perf_counter() - start, time.process_time() - cpu)
            if round_ >= 0:
                samples[name].append(sample)
    return samples


def summarize(found: dict[str, Contender], taken: dict[str, list[Sample]], rows: int) -> list[dict[str, Any]]:
    """One line per contender; `of_limit` compares bytes per second with the probe's best."""
    best = {name: min(sample.wall for sample in samples) for name, samples in taken.items()}
    limit = found["probe"].nbytes / best["probe"]
    bf16 = statistics.median(s.wall for s in taken["torch bf16"])
    made = []
    for name, contender in found.items():
        median = statistics.median(s.wall for s in taken[name])
        made.append(
            {
                "rows": rows,
                "contender": name,
                "median_ms": round(median * 1e3, 2),
                "min_ms": round(best[name] * 1e3, 2),
                "max_ms": round(max(s.wall for s in taken[name]) * 1e3, 2),
                "cpu_ms": round(statistics.median(s.cpu for s in taken[name]) * 1e3, 2),
                "cpu_min_ms": round(min(s.cpu for s in taken[name]) * 1e3, 2),
                "MB": round(contender.nbytes / 1e6, 1),
                "GB_per_s_at_min": round(contender.nbytes / best[name] / 1e9, 1),
                "of_limit_at_min": round(contender.nbytes / best[name] / limit, 3),
                "times_bf16_median": round(bf16 / median, 2),
                "times_bf16_min": round(best["torch bf16"] / best[name], 2),
            }
        )
    return made


def machine() -> dict[str, Any]:
    """What was measured on, without names or paths."""
    cpu = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")), ": ")
    size = next((line for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0 0")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_GiB": round(int(size.split()[1]) / 2**20),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "implementations": [
            f"{row.op}: {row.implementation}, {row.why}" for row in load("linear", torch.device("cpu"))
        ],
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def main() -> None:
    """Measure, print a table for every number of rows, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128], help="rows of x")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compiled", action="store_true", help="torchao's compiled layers too")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    loads, made = [os.getloadavg()[0]], []
    described = machine()
    dense = weights(args.layers, args.size)
    for rows in args.rows:
        x = torch.randn(rows, args.size).bfloat16()
        found = {**torchs(dense, x), **torchaos(dense, x, args.compiled), **ours(dense, x)}
        found["probe"] = probe(sum(w.nbytes for w in dense), args.threads)
        table = summarize(found, measure(found, args.rounds), rows)
        made += table
        print(
            f"{rows} rows, {args.layers} layers of {args.size}, {args.threads} threads, {args.rounds} rounds"
        )
        print(f"{'':38}{'median ms':>10}{'min':>8}{'CPU ms':>9}{'GB/s':>7}{'of limit':>10}{'x bf16':>8} min")
        for row in table:
            print(
                f"{row['contender']:38}{row['median_ms']:10.2f}{row['min_ms']:8.2f}{row['cpu_ms']:9.2f}"
                f"{row['GB_per_s_at_min']:7.1f}{row['of_limit_at_min']:10.0%}{row['times_bf16_median']:8.2f}"
                f"{row['times_bf16_min']:6.2f}"
            )
    loads.append(os.getloadavg()[0])
    print(f"load before and after: {loads}")
    if args.json:
        settings = {key: getattr(args, key) for key in ("size", "layers", "threads", "rounds")}
        result = {"bench": "linear", "date": date.today().isoformat(), "machine": described, **settings}
        result |= {"load_before_and_after": [round(value, 2) for value in loads], "lines": made}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
