"""Times one training step of ds-zero and its peers on two gloo ranks, interleaved, one thread per rank.

Each sample is a fresh pair of processes: a few warm-up steps, then some timed ones. Rounds go A B C A B C.
Prints a table and writes JSON: wall and CPU time per rank (minimum and median over rounds), tokens per
second, the optimizer's own step (with what sharding does before and after it), live tensor bytes per
parameter after a step, peak resident memory, and the machine's load.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def rank_main(args: argparse.Namespace) -> None:
    """One rank of one sample; rank 0 prints its figures as the last line."""
    import torch
    import torch.distributed as dist
    from contenders import CONTENDERS, Absent, Setting
    from gpt import build
    from sample import cpu_seconds, live_tensor_bytes, micro_batches, status_bytes, tell, time_steps

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.rank_of.startswith("deepspeed") and _has_deepspeed():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    model = build(args.size)
    numel = sum(p.numel() for p in model.parameters())
    try:
        step = CONTENDERS[args.rank_of](model, Setting(world, args.accumulate, args.dtype == "bf16"))
    except Absent as reason:
        tell({"absent": str(reason)})
        os._exit(0)
    clocks = {"walls": time.perf_counter, "cpus": cpu_seconds}
    batches = micro_batches(args.size, args.accumulate, rank)
    times = time_steps(step, batches, clocks, warmup=args.warmup, steps=args.steps)
    figures = {
        **times,
        "numel": numel,
        "peak_rss": status_bytes("VmHWM"),
        "live_bytes": live_tensor_bytes(),
    }
    if rank == 0:
        tell(figures)
    dist.barrier()
    os._exit(0)  # some peers hang in their own shutdown


def _has_deepspeed() -> bool:
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None


def sample(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One pair of processes; what rank 0 printed, or why there is nothing."""
    from sample import told

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--size", args.size, "--dtype", args.dtype, "--accumulate", str(args.accumulate)]
    flags += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--rank-of", name]
    ranks = []
    for rank in range(args.world):
        environ = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(args.world),
            "LOCAL_SIZE": str(args.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONWARNINGS": "ignore",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if args.keep_memory:
            environ |= {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(256 << 20)}
        command = [sys.executable, str(HERE / "step.py"), *flags]
        ranks.append(
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = []
    for process in ranks:
        try:
            outputs.append(process.communicate(timeout=args.timeout))
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            return {"failed": f"no answer in {args.timeout} s"}
    result = told(outputs[0][0].splitlines())
    if result is None:
        errors = [line for line in outputs[0][1].splitlines() if line.strip()]
        return {"failed": errors[-1][:300] if errors else f"exit code {ranks[0].returncode}"}
    return result


def summarise(name: str, samples: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    from sample import SEQUENCE

    walls = [wall for one in samples for wall in one["walls"]]
    cpus = [cpu for one in samples for cpu in one["cpus"]]
    updates = [update for one in samples for update in one["updates"]]
    tokens = args.world * args.accumulate * SEQUENCE
    return {
        "contender": name,
        "wall_ms_min": round(min(walls) * 1e3, 1),
        "wall_ms_median": round(statistics.median(walls) * 1e3, 1),
        "wall_ms_max": round(max(walls) * 1e3, 1),
        "cpu_ms_min": round(min(cpus) * 1e3, 1),
        "cpu_ms_median": round(statistics.median(cpus) * 1e3, 1),
        "update_ms_min": round(min(updates) * 1e3, 1) if updates else None,
        "update_ms_median": round(statistics.median(updates) * 1e3, 1) if updates else None,
        "tokens_per_s_best": round(tokens / min(walls)),
        "tokens_per_s_median": round(tokens / statistics.median(walls)),
        "live_bytes_per_param": round(
            statistics.median(one["live_bytes"] / one["numel"] for one in samples), 2
        ),
        "peak_rss_mb": round(statistics.median(one["peak_rss"] for one in samples) / 2**20),
        "samples": len(samples),
    }


def main() -> None:
    from contenders import CONTENDERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated names")
    parser.add_argument("--size", default="30m", help="tiny, 30m or 125m")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument(
        "--keep-memory", action="store_true", help="let every contender keep freed memory, as ds-zero does"
    )
    parser.add_argument("--out", type=Path, help="append the JSON of this run to a file")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank_main(args)
        return
    names = args.contenders.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    collected: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    loads = []
    for _ in range(args.rounds):
        for name in names:
            if name in skipped:
                continue
            loads.append(os.getloadavg()[0])
            result = sample(name, args)
            reason = result.get("absent") or result.get("failed")
            if reason:
                skipped[name] = reason
                print(f"skipped {name}: {reason}", file=sys.stderr)
            else:
                collected[name].append(result)
    rows = [summarise(name, samples, args) for name, samples in collected.items() if samples]
    report(rows, skipped, loads, args)


def report(
    rows: list[dict[str, Any]], skipped: dict[str, str], loads: list[float], args: argparse.Namespace
) -> None:
    import torch
    from sample import machine

    bound = next((row for row in rows if row["contender"] == "no_communication"), None)
    print(f"{args.size} {args.dtype} accumulate {args.accumulate}, {args.world} ranks x 1 thread")
    print(
        f"{'':20}{'wall ms':>9}{'median':>9}{'cpu ms':>8}{'tok/s':>7}"
        f"{'% bound':>9}{'B/param':>9}{'RSS MB':>8}{'update ms':>11}"
    )
    for row in rows:
        share = 100 * bound["wall_ms_min"] / row["wall_ms_min"] if bound else float("nan")
        row["percent_of_bound"] = round(share, 1)
        print(
            f"{row['contender']:20}{row['wall_ms_min']:9.0f}{row['wall_ms_median']:9.0f}{row['cpu_ms_min']:8.0f}"
            f"{row['tokens_per_s_best']:7}{share:9.0f}{row['live_bytes_per_param']:9.2f}{row['peak_rss_mb']:8}"
            f"{row['update_ms_min'] or float('nan'):11.1f}"
        )
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "torch": torch.__version__,
        "size": args.size,
        "dtype": args.dtype,
        "accumulate": args.accumulate,
        "world": args.world,
        "keep_memory": args.keep_memory,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "load_median": round(statistics.median(loads), 2),
        "skipped": skipped,
        "rows": rows,
    }
    print(json.dumps(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
