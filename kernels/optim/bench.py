"""AdamW on this machine: torch's fused one, DeepSpeed's CPUAdam and ours, interleaved with a bandwidth probe.

A "mixed" contender does the whole of a mixed-precision step: bf16 gradients in, fp32 step, bf16 parameters
out. Rounds go A B C A B C, so that what else runs on the machine disturbs all alike.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_kernels import FusedAdamW

# The limit: the same streams in the same order as the step, with next to no arithmetic and large pages.
PROBE = r"""
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
static void* pages(size_t bytes) {
  const size_t large = 2u << 20;
  char* p = (char*)mmap(0, bytes + large, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  p = (char*)(((uintptr_t)p + large - 1) & ~(uintptr_t)(large - 1));
  madvise(p, bytes, MADV_HUGEPAGE);
  memset(p, 0, bytes);
  return p;
}
static void* memory[5];
extern "C" void probe_open(int64_t n) {
  for (int k = 0; k < 5; ++k) memory[k] = pages(n * (k < 4 ? 4 : 2));
}
extern "C" void probe_run(int64_t n, int mixed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t k = 0; k < n; k += 32768) {
    const int64_t end = k + 32768 < n ? k + 32768 : n;
    float *__restrict a = (float*)memory[0], *__restrict b = (float*)memory[1];
    float* __restrict c = (float*)memory[2];
    uint16_t* __restrict e = (uint16_t*)memory[4];
    if (mixed) {
      const uint16_t* __restrict g = (const uint16_t*)memory[3];
      for (int64_t i = k; i < end; ++i) {
        const float x = (float)g[i] * 1e-9f;
        a[i] += x, b[i] += x, c[i] += x, e[i] = (uint16_t)(int32_t)a[i];
      }
    } else {
      const float* __restrict g = (const float*)memory[3];
      for (int64_t i = k; i < end; ++i) a[i] += g[i], b[i] += g[i], c[i] += g[i];
    }
  }
}
"""


class Contender(NamedTuple):
    """A step to time and the bytes per parameter that cannot be avoided (mixed: 4+4+4+2 in, 4+4+4+2 out)."""

    run: Callable[[], None]
    bytes_per_param: int


class Sample(NamedTuple):
    """One timed step: wall and own processor seconds, and the share of all cores that others took."""

    wall: float
    cpu: float
    others: float


class Sizes(NamedTuple):
    """How many parameters, in how many tensors."""

    params: int
    tensors: int


class Data:
    """What all contenders share: parameters and gradients in fp32 and bf16; each has its own moments."""

    def __init__(self, sizes: Sizes) -> None:
        each = sizes.params // sizes.tensors
        generator = torch.Generator().manual_seed(0)
        make = [torch.empty(each) for _ in range(sizes.tensors)]
        self.params = [nn.Parameter(t.normal_(0, 0.02, generator=generator)) for t in make]
        self.grads = [torch.empty(each).normal_(0, 0.01, generator=generator) for _ in self.params]
        self.low_grads = [g.bfloat16() for g in self.grads]
        self.low_params = [p.detach().bfloat16() for p in self.params]

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Hang the fp32 gradients on the parameters; not timed by ours, which may take bf16 ones."""
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        yield

    def cast_in(self) -> None:
        """bf16 gradients to fp32, as a peer needs them: into memory it already has."""
        torch._foreach_copy_(self.grads, self.low_grads)

    @torch.no_grad()
    def cast_out(self) -> None:
        """fp32 parameters to bf16."""
        torch._foreach_copy_(self.low_params, list[torch.Tensor](self.params))


def contenders(data: Data, threads: int) -> dict[str, Contender]:
    """Everything that is timed, ours and theirs, plain and mixed."""

    def mixed(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            data.cast_in()
            step()
            data.cast_out()

        return run

    torch_fused = torch.optim.AdamW(data.params, lr=1e-4, fused=True)
    found = {
        "torch fused": Contender(torch_fused.step, 28),
        "torch fused, mixed": Contender(mixed(torch_fused.step), 28),
    }
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeedCPUAdam: skipped, because `deepspeed` is not installed", file=sys.stderr)
    else:
        theirs = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(data.params, lr=1e-4)
        found["DeepSpeedCPUAdam"] = Contender(theirs.step, 28)
        found["DeepSpeedCPUAdam, mixed"] = Contender(mixed(theirs.step), 28)
    plain, out, both = (FusedAdamW(data.params, lr=1e-4) for _ in range(3))
    for optimizer in (out, both):
        optimizer.copy_out = dict(zip(data.params, data.low_params, strict=True))
    both.low_precision_grads = dict(zip(data.params, data.low_grads, strict=True))
    return {
        **found,
        "ours": Contender(plain.step, 28),
        "ours, bf16 out": Contender(out.step, 30),
        "ours, mixed": Contender(both.step, 28),
        **probes(data, threads),
    }


def probes(data: Data, threads: int) -> dict[str, Contender]:
    """The bandwidth probe, compiled here; its time is the limit of the steps with the same streams."""
    numel = sum(p.numel() for p in data.params)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        handle = ctypes.CDLL(str(library))
    handle.probe_open(ctypes.c_int64(numel))
    run = [lambda k=k: handle.probe_run(ctypes.c_int64(numel), k, threads) for k in (0, 1)]
    return {"probe": Contender(run[0], 28), "probe, mixed": Contender(run[1], 28)}


def measure(found: dict[str, Contender], rounds: int, patience: float) -> dict[str, list[Sample]]:
    """The samples of every contender, interleaved, after two rounds to warm up.

    A round waits until others leave the cores alone; all waits together last at most `patience` seconds.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in found}
    for round_ in range(-2, rounds):
        while round_ >= 0 and patience > 0 and _busy_share(0.25) > 0.1:
            patience -= 0.25
        for name, contender in found.items():
            busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
            contender.run()
            wall, cpu = time.perf_counter() - start, time.process_time() - own
            others = max(0.0, _busy_seconds() - busy - cpu) / (wall * (os.cpu_count() or 1))
            if round_ >= 0:
                samples[name].append(Sample(wall, cpu, others))
    return samples


def _busy_seconds() -> float:
    """Processor seconds that anything has used since the machine started; 0 where the kernel does not say."""
    fields = [int(x) for x in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _busy_share(seconds: float) -> float:
    """The share of all cores in use while we sleep."""
    before = _busy_seconds()
    time.sleep(seconds)
    return (_busy_seconds() - before) / (seconds * (os.cpu_count() or 1))


def summarize(
    found: dict[str, Contender], taken: dict[str, list[Sample]], params: int
) -> list[dict[str, Any]]:
    """One row per contender; `of_limit` compares its best time with the probe's best of the same bytes."""
    best = {name: min(sample.wall for sample in samples) for name, samples in taken.items()}
    rows = []
    for name, contender in found.items():
        samples, least = taken[name], best[name]
        limit = best["probe, mixed" if "mixed" in name else "probe"] * contender.bytes_per_param / 28
        calm = sorted(samples, key=lambda sample: sample.others)[: (len(samples) + 1) // 2]
        rows.append(
            {
                "contender": name,
                "median_ms": round(statistics.median(s.wall for s in samples) * 1e3, 2),
                "calm_median_ms": round(statistics.median(s.wall for s in calm) * 1e3, 2),
                "min_ms": round(least * 1e3, 2),
                "max_ms": round(max(s.wall for s in samples) * 1e3, 2),
                "cpu_ms": round(statistics.median(s.cpu for s in samples) * 1e3, 1),
                "others_share": round(statistics.median(s.others for s in samples), 2),
                "bytes_per_param": contender.bytes_per_param,
                "GB_per_s_at_min": round(contender.bytes_per_param * params / least / 1e9, 1),
                "of_limit_at_min": round(limit / least, 3),
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster ours is than each peer, by each statistic."""
    by_name = {row["contender"]: row for row in rows}
    pairs = [("ours", ""), ("ours, mixed", ", mixed")]
    return {
        f"{ours} against {peer}{suffix}": {
            k: round(by_name[peer + suffix][f"{k}_ms"] / by_name[ours][f"{k}_ms"], 2)
            for k in ("median", "calm_median", "min")
        }
        for ours, suffix in pairs
        for peer in ("torch fused", "DeepSpeedCPUAdam")
        if peer in by_name
    }


def machine() -> dict[str, Any]:
    """What was measured on, without names or paths."""
    fields = dict(
        line.split(":", 1) for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines() if ":" in line
    )
    described = {key.strip(): value.strip() for key, value in fields.items()}
    size = next(
        (line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0"
    )
    thp = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": described.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "memory_GiB": round(int(size) / 2**20),
        "large_pages": thp[thp.find("[") + 1 : thp.find("]")] if "[" in thp else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _version(name: str) -> str | None:
    from importlib import metadata

    return metadata.version(name) if importlib.util.find_spec(name) is not None else None


def main() -> None:
    """Measure, print the table, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=100_000_000)
    parser.add_argument("--tensors", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for idle cores, in all")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = [os.getloadavg()[0]]
    data = Data(Sizes(args.params, args.tensors))
    with data.gradients():
        found = contenders(data, args.threads)
        rows = summarize(found, measure(found, args.rounds, args.patience), args.params)
    load.append(os.getloadavg()[0])
    result = {
        "bench": "optim",
        "date": date.today().isoformat(),
        "machine": machine(),
        **{key: getattr(args, key) for key in ("params", "tensors", "threads", "rounds")},
        "load_before_and_after": [round(x, 2) for x in load],
        "rows": rows,
        "ratios": ratios(rows),
    }
    print(
        f"{args.params:,} parameters in {args.tensors} tensors, {args.threads} threads, "
        f"{args.rounds} rounds, load {load}"
    )
    print(f"{'':26}{'median ms':>10}{'calm':>8}{'min':>8}{'CPU ms':>9}{'GB/s':>7}{'of limit':>10}")
    for row in rows:
        print(
            f"{row['contender']:26}{row['median_ms']:10.1f}{row['calm_median_ms']:8.1f}{row['min_ms']:8.1f}{row['cpu_ms']:9.0f}"
            f"{row['GB_per_s_at_min']:7.1f}{row['of_limit_at_min']:10.0%}"
        )
    for name, values in result["ratios"].items():
        print(name, *(f"{value:.2f} x ({key})" for key, value in values.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
