"""Optimizer steps on this machine: torch's, DeepSpeed's for CPUs, and ours, beside a bandwidth probe.

A "mixed" contender does the whole of a mixed-precision step: bf16 gradients in, fp32 step, bf16 parameters
out. Rounds go A B C A B C, so that what else runs on the machine disturbs all alike. Every rule is run on one
tensor and on 2000; a JSON line for each goes to results/.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
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
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_kernels import FusedAdagrad, FusedAdamW, FusedLamb, FusedLion, FusedSGD

# The limit: the same streams in the same order as a step with so many states, with next to no arithmetic and
# large pages.
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
template <int S> static void run(int64_t k, int64_t end, int mixed) {
  float *__restrict a = (float*)memory[0], *__restrict b = (float*)memory[1];
  float* __restrict c = (float*)memory[2];
  uint16_t* __restrict e = (uint16_t*)memory[4];
  if (mixed) {
    const uint16_t* __restrict g = (const uint16_t*)memory[3];
    for (int64_t i = k; i < end; ++i) {
      const float x = (float)g[i] * 1e-9f;
      a[i] += x, e[i] = (uint16_t)(int32_t)a[i];
      if (S > 0) b[i] += x;
      if (S > 1) c[i] += x;
    }
  } else {
    const float* __restrict g = (const float*)memory[3];
    for (int64_t i = k; i < end; ++i) {
      a[i] += g[i];
      if (S > 0) b[i] += g[i];
      if (S > 1) c[i] += g[i];
    }
  }
}
extern "C" void probe_run(int64_t n, int states, int mixed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t k = 0; k < n; k += 32768) {
    const int64_t end = k + 32768 < n ? k + 32768 : n;
    if (states == 0) run<0>(k, end, mixed);
    if (states == 1) run<1>(k, end, mixed);
    if (states == 2) run<2>(k, end, mixed);
  }
}
"""


class Contender(NamedTuple):
    """A step to time, and the bytes per parameter that it cannot avoid."""

    run: Callable[[], Any]
    bytes_per_param: int


class Sample(NamedTuple):
    """One timed step: wall and own processor seconds, and the share of all cores that others took."""

    wall: float
    cpu: float
    others: float


class Rule(NamedTuple):
    """An optimizer by ours, torch's and DeepSpeed's names; peers of None there are not."""

    ours: Callable[..., Any]
    states: int
    torchs: Callable[..., Any] | None = None
    deepspeeds: tuple[str, str] | None = None
    momentum: float | None = None

    @property
    def bytes_per_param(self) -> int:
        """Parameters and states read and written, the gradient read; mixed it is the same: 2 + 2 for 4."""
        return 8 + 8 * self.states + 4


RULES = {
    "adamw": Rule(FusedAdamW, 2, torch.optim.AdamW, ("adam", "DeepSpeedCPUAdam")),
    "adagrad": Rule(FusedAdagrad, 1, torch.optim.Adagrad, ("adagrad", "DeepSpeedCPUAdagrad")),
    "lion": Rule(FusedLion, 1, None, ("lion", "DeepSpeedCPULion")),
    "momentum": Rule(FusedSGD, 1, torch.optim.SGD, momentum=0.9),
    "sgd": Rule(FusedSGD, 0, torch.optim.SGD),
    "lamb": Rule(FusedLamb, 2),
}


class Data:
    """What all contenders share: parameters and gradients in fp32 and bf16; each has its own states."""

    def __init__(self, params: int, tensors: int) -> None:
        generator, each = torch.Generator().manual_seed(0), params // tensors
        make = [torch.empty(each) for _ in range(tensors)]
        self.params = [nn.Parameter(t.normal_(0, 0.02, generator=generator)) for t in make]
        self.grads = [torch.empty(each).normal_(0, 0.01, generator=generator) for _ in self.params]
        self.low_grads = [g.bfloat16() for g in self.grads]
        self.low_params = [p.detach().bfloat16() for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def mixed(self, step: Callable[[], Any]) -> Callable[[], None]:
        """A peer's mixed-precision step: cast, step, cast, with memory that is there already."""

        @torch.no_grad()
        def run() -> None:
            torch._foreach_copy_(self.grads, self.low_grads)
            step()
            torch._foreach_copy_(self.low_params, list[torch.Tensor](self.params))

        return run


def contenders(rule: Rule, data: Data) -> dict[str, Contender]:
    """Everything that is timed, ours and theirs, plain and mixed."""
    steps: dict[str, Callable[[], Any]] = {}
    settings = {"lr": 1e-4} if rule.momentum is None else {"lr": 1e-4, "momentum": rule.momentum}
    if rule.torchs is not None:
        for how in ("fused", "foreach"):
            steps[f"torch {how}"] = rule.torchs(data.params, **{how: True}, **settings).step
    if rule.deepspeeds is not None:
        module, name = rule.deepspeeds
        if importlib.util.find_spec("deepspeed") is None:
            print(f"{name}: skipped, because `deepspeed` is not installed", file=sys.stderr)
        else:
            kind = getattr(importlib.import_module(f"deepspeed.ops.{module}"), name)
            steps[name] = kind(data.params, **settings).step
    moved = rule.bytes_per_param
    found = {name: Contender(step, moved) for name, step in steps.items()}
    found |= {f"{name}, mixed": Contender(data.mixed(step), moved) for name, step in steps.items()}
    plain, both = (rule.ours(data.params, **settings) for _ in range(2))
    both.copy_out = dict(zip(data.params, data.low_params, strict=True))
    both.low_precision_grads = dict(zip(data.params, data.low_grads, strict=True))
    second_pass = 12 if rule.ours is FusedLamb else 0  # weights and both moments are read once more
    found["ours"] = Contender(plain.step, moved + second_pass)
    found["ours, mixed"] = Contender(both.step, moved + second_pass)
    if rule.ours is FusedAdamW:
        undo, small = (rule.ours(data.params, **settings) for _ in range(2))
        undo.keep_undo, small.state_dtype, small.seed = True, torch.bfloat16, 0
        found["ours, undo kept"] = Contender(undo.step, moved + 12)
        found["ours, bf16 states by chance"] = Contender(small.step, moved - 8)
    return found


def probe(threads: int, numel: int) -> Callable[[int, bool], Callable[[], None]]:
    """The bandwidth probe, compiled here: (states, mixed) -> what takes as long as memory does."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        handle = ctypes.CDLL(str(library))
    handle.probe_open(ctypes.c_int64(numel))

    def of(states: int, mixed: bool) -> Callable[[], None]:
        return lambda: handle.probe_run(ctypes.c_int64(numel), states, int(mixed), threads)

    return of


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
        limit = "probe, mixed" if "mixed" in name else "probe"
        expected = best[limit] * contender.bytes_per_param / found[limit].bytes_per_param
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
                "of_limit_at_min": round(expected / least, 3),
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster ours is than each peer, by each statistic."""
    by_name = {row["contender"]: row for row in rows}
    pairs = [(f"ours{suffix}", peer) for suffix in ("", ", mixed") for peer in by_name]
    return {
        f"{ours} against {peer}": {
            k: round(by_name[peer][f"{k}_ms"] / by_name[ours][f"{k}_ms"], 2)
            for k in ("median", "calm_median", "min")
        }
        for ours, peer in pairs
        if not peer.startswith(("ours", "probe")) and ("mixed" in peer) == ("mixed" in ours)
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


def show(result: dict[str, Any]) -> None:
    """Print one run."""
    print(
        f"{result['rule']}: {result['params']:,} parameters in {result['tensors']} tensors, "
        f"{result['threads']} threads, {result['rounds']} rounds, load {result['load_before_and_after']}"
    )
    print(f"{'':30}{'median ms':>10}{'calm':>8}{'min':>8}{'CPU ms':>9}{'GB/s':>7}{'of limit':>10}")
    for row in result["rows"]:
        print(
            f"{row['contender']:30}{row['median_ms']:10.1f}{row['calm_median_ms']:8.1f}{row['min_ms']:8.1f}"
            f"{row['cpu_ms']:9.0f}{row['GB_per_s_at_min']:7.1f}{row['of_limit_at_min']:10.0%}"
        )
    for name, values in result["ratios"].items():
        print(name, *(f"{value:.2f} x ({key})" for key, value in values.items()))


def main() -> None:
    """Measure, print the tables, and write a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", default="adamw,adagrad,lion,momentum", help=", ".join(RULES))
    parser.add_argument("--params", type=int, default=100_000_000)
    parser.add_argument("--tensors", default="1,2000", help="how many tensors they are in; several runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for idle cores, in a run")
    parser.add_argument("--out", type=Path, help="where lines go; default: results/<date>.jsonl here")
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"{date.today().isoformat()}.jsonl"
    torch.set_num_threads(args.threads)
    limit = probe(args.threads, args.params)
    for tensors in map(int, args.tensors.split(",")):
        data = Data(args.params, tensors)
        for name in args.rules.split(","):
            rule, load = RULES[name], [os.getloadavg()[0]]
            found = contenders(rule, data)
            for mixed in (False, True):
                run = limit(rule.states, mixed)
                found["probe, mixed" if mixed else "probe"] = Contender(run, rule.bytes_per_param)
            rows = summarize(found, measure(found, args.rounds, args.patience), args.params)
            load.append(os.getloadavg()[0])
            result = {
                "bench": "optim", "rule": name, "date": date.today().isoformat(), "machine": machine(),
                "params": args.params, "tensors": tensors, "threads": args.threads, "rounds": args.rounds,
                "load_before_and_after": [round(x, 2) for x in load], "rows": rows, "ratios": ratios(rows),
            }  # fmt: skip
            show(result)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            del found
            gc.collect()


if __name__ == "__main__":
    main()
