"""Reads and writes of one large file: fio, DeepSpeed's aio with pinned memory, numpy, and ours by engine.

All use the same file, which is there before, with the same block size, depth and number of threads, past the
page cache except numpy. Rounds go A B C A B C, each beginning with another one, so that what else runs on the
machine and what the disk remembers disturb all alike. Prints one JSON line per contender.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_kernels.aio import AlignedPool, AsyncIO, describe

OPS = ("write", "read")


class Sizes(NamedTuple):
    """How much, and how much at a time."""

    num_bytes: int
    block: int
    depth: int  # blocks under way, in all
    threads: int


class Sample(NamedTuple):
    """Wall seconds, and processor seconds of the process that did it (None: not known)."""

    wall: float
    cpu: float | None


Run = Callable[[str], Sample]  # "read" or "write" -> how long it took


def timed(work: Callable[[], Any]) -> Sample:
    """One piece of work in this process, with all its threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def ours(engine: str, path: Path, memory: Tensor, sizes: Sizes) -> Iterator[Run]:
    """Ours: one request for the whole file, in memory of a pool."""
    with AsyncIO(
        engine=engine,  # type: ignore[arg-type]
        queue_depth=sizes.depth,
        block_size=sizes.block,
        threads=sizes.threads if engine in ("io_uring", "libaio") else None,
    ) as io:
        yield lambda op: timed(lambda: getattr(io, op)(path, memory).result())


@contextmanager
def fio(engine: str, path: Path, sizes: Sizes, *more: str, **env: str) -> Iterator[Run]:
    """fio: one job per thread, with its part of the file and of the depth; it measures itself."""
    part = sizes.num_bytes // sizes.threads // sizes.block * sizes.block

    def run(op: str) -> Sample:
        command = [
            *("fio", "--name=x", f"--filename={path}", f"--rw={op}", f"--bs={sizes.block}", "--direct=1"),
            *(f"--ioengine={engine}", f"--iodepth={sizes.depth // sizes.threads}", "--thread"),
            *(f"--numjobs={sizes.threads}", f"--size={part}", f"--offset_increment={part}"),
            *("--fallocate=none", "--output-format=json", *more),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
        jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        seconds = max(job[op]["runtime"] for job in jobs) / 1e3
        moved = sum(job[op]["io_bytes"] for job in jobs)
        cpu = sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job[op]["runtime"] / 1e3 for job in jobs)
        return Sample(seconds * sizes.num_bytes / moved, cpu)

    yield run


@contextmanager
def deepspeed(path: Path, memory: Tensor, sizes: Sizes) -> Iterator[Run]:
    """DeepSpeed's aio_handle with memory of its own new_cpu_locked_tensor."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for its ninja
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder
    handle = (
        builder().load().aio_handle(sizes.block, sizes.depth // sizes.threads, False, True, sizes.threads)
    )
    pinned = handle.new_cpu_locked_tensor(sizes.num_bytes, torch.empty(0, dtype=torch.uint8))
    pinned.copy_(memory)

    def run(op: str) -> Sample:
        call = handle.sync_pwrite if op == "write" else handle.sync_pread
        return timed(lambda: call(pinned, str(path), 0))

    yield run
    handle.free_cpu_locked_tensor(pinned)


@contextmanager
def numpy(path: Path, memory: Tensor, sizes: Sizes) -> Iterator[Run]:
    """numpy through the page cache, written back and dropped: what one writes without any of this."""

    def run(op: str) -> Sample:
        drop(path)
        return timed(write if op == "write" else lambda: np.fromfile(path, dtype=np.uint8))

    def write() -> None:
        with path.open("r+b") as file:
            memory.numpy().tofile(file)
            os.fsync(file.fileno())

    yield run
    drop(path)


def drop(path: Path) -> None:
    """Nothing of the file is in the page cache after this."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contenders(path: Path, memory: Tensor, sizes: Sizes) -> dict[str, Any]:
    """All that can be had here; those that cannot say why."""
    found: dict[str, Any] = {}
    for engine in ("io_uring", "libaio") if shutil.which("fio") else ():
        found[f"fio {engine}"] = fio(engine, path, sizes)
        found[f"fio {engine}, large pages"] = fio(
            engine, path, sizes, GLIBC_TUNABLES="glibc.malloc.hugetlb=1"
        )
    if found:
        more = ("--fixedbufs", "--registerfiles")
        found["fio io_uring, registered"] = fio("io_uring", path, sizes, *more)
    else:
        say(skipped="fio", why="there is no fio on PATH")
    for row in describe():
        if row.there:
            found[f"ours {row.engine}"] = ours(row.engine, path, memory, sizes)
        else:
            say(skipped=f"ours {row.engine}", why=row.why)
    # Aligned as well, but in small pages, and not locked.
    small = torch.empty(sizes.num_bytes + 4096, dtype=torch.uint8)
    small = small[-small.data_ptr() % 4096 :][: sizes.num_bytes].copy_(memory)
    first = next(row.engine for row in describe() if row.used)
    found[f"ours {first}, ordinary memory"] = ours(first, path, small, sizes)
    if importlib.util.find_spec("deepspeed") is not None:
        found["DeepSpeed pinned"] = deepspeed(path, memory, sizes)
    else:
        say(skipped="DeepSpeed pinned", why="deepspeed is not installed here")
    found["numpy, buffered"] = numpy(path, memory, sizes)
    return found


def measure(found: dict[str, Any], rounds: int, seconds: float) -> dict[tuple[str, str], list[Sample]]:
    """`rounds` rounds, or as many as fit into the time; one before them does not count."""
    runs: dict[str, Run] = {}
    for name, opened in list(found.items()):
        try:
            runs[name] = opened.__enter__()
            for op in OPS:
                runs[name](op)
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            say(skipped=name, why=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            runs.pop(name, None)
            del found[name]
    samples: dict[tuple[str, str], list[Sample]] = {(name, op): [] for name in runs for op in OPS}
    names, end = list(runs), time.monotonic() + seconds
    for i in range(rounds):
        if time.monotonic() > end:
            say(note=f"stopped after {i} of {rounds} rounds: {seconds} s are over")
            break
        for op in OPS:
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name, op].append(runs[name](op))
    for name in names:
        found[name].__exit__(None, None, None)
    return samples


def summarize(samples: dict[tuple[str, str], list[Sample]], num_bytes: int) -> list[dict[str, Any]]:
    """GB/s by median, best and worst, and what a GB costs the processor."""
    rows = []
    for (name, op), taken in samples.items():
        walls = [sample.wall for sample in taken]
        cpus = [sample.cpu for sample in taken if sample.cpu is not None]
        rows.append(
            {
                "contender": name,
                "op": op,
                "median_GB_per_s": round(num_bytes / statistics.median(walls) / 1e9, 2),
                "best_GB_per_s": round(num_bytes / min(walls) / 1e9, 2),
                "worst_GB_per_s": round(num_bytes / max(walls) / 1e9, 2),
                "cpu_s_per_GB": round(statistics.median(cpus) / num_bytes * 1e9, 3) if cpus else None,
                "rounds": len(walls),
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against fio with the same engine (and the same kind of pages), and against DeepSpeed."""
    by_name = {(row["contender"], row["op"]): row for row in rows}
    pairs = [
        (f"ours {e}", f"fio {e}{pages}") for e in ("io_uring", "libaio") for pages in ("", ", large pages")
    ]
    pairs += [("ours io_uring, ordinary memory", "fio io_uring")]
    pairs += [(f"ours {e}", "DeepSpeed pinned") for e in ("io_uring", "libaio", "threads")]
    return [
        {
            "ratio": f"{mine} / {peer}",
            "op": op,
            **{
                key: round(by_name[mine, op][f"{key}_GB_per_s"] / by_name[peer, op][f"{key}_GB_per_s"], 2)
                for key in ("median", "best")
            },
        }
        for mine, peer in pairs
        for op in OPS
        if (mine, op) in by_name and (peer, op) in by_name
    ]


def tune(path: Path, memory: Tensor, rounds: int) -> None:
    """Ours over block sizes, depths and threads, interleaved: where the defaults come from."""
    cases = itertools.product((256 << 10, 1 << 20, 4 << 20), (8, 32, 128), (1, 2))
    found: dict[str, Any] = {}
    for engine in ("io_uring", "libaio"):
        for block, depth, threads in cases:
            sizes = Sizes(memory.nbytes, block, depth, threads)
            found[f"{engine} {block >> 10}K x {depth}, {threads} threads"] = ours(engine, path, memory, sizes)
        cases = itertools.product((256 << 10, 1 << 20, 4 << 20), (8, 32, 128), (1, 2))
    for threads in (2, 4, 8, 16):
        for block in (1 << 20, 4 << 20):
            sizes = Sizes(memory.nbytes, block, threads, threads)
            found[f"threads {block >> 10}K, {threads}"] = ours("threads", path, memory, sizes)
    for row in summarize(measure(found, rounds, 600), memory.nbytes):
        say(**row)


def say(**fields: Any) -> None:
    """One JSON line."""
    print(json.dumps(fields), flush=True)


def machine(folder: Path) -> dict[str, Any]:
    """What was measured on, without names or paths."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = next((value.strip() for key, value in fields if key.strip() == "model name"), platform.machine())
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holds = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release().split("-")[0],
        "file_system": max(holds, key=lambda found: len(found[0]))[1] if holds else "unknown",
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed") if importlib.util.find_spec("deepspeed") else None,
    }


def main() -> None:
    """Measure, print JSON lines, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=64, help="blocks under way, over all threads")
    parser.add_argument("--threads", type=int, default=2, help="threads, and jobs of fio")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=180, help="begin no round after this time")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to be measured")
    parser.add_argument("--tune", action="store_true", help="ours only, over settings")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    sizes = Sizes(args.mib << 20, args.block_kib << 10, args.depth, args.threads)
    load = [round(os.getloadavg()[0], 2)]
    with tempfile.TemporaryDirectory(prefix="aio-bench-", dir=args.folder) as folder:
        path, pool = Path(folder) / "file", AlignedPool(sizes.num_bytes, 1)
        memory = pool.lease()
        memory.view(torch.int64).random_()  # a disk may look for zeros
        with AsyncIO() as io:
            io.write(path, memory, durable=True).result()
        if args.tune:
            return tune(path, memory, args.rounds)
        rows = summarize(measure(contenders(path, memory, sizes), args.rounds, args.seconds), sizes.num_bytes)
    load.append(round(os.getloadavg()[0], 2))
    result = {
        "bench": "aio",
        "date": date.today().isoformat(),
        "machine": machine(args.folder),
        **sizes._asdict(),
        "locked": pool.locked,
        "load_before_and_after": load,
    }
    rows += ratios(rows)
    for row in (result, *rows):
        say(**row)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
