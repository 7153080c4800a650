"""Collectives between ranks of one host: shared memory, gloo, DeepSpeed's shared-memory all-reduce, memcpy.

Two processes with a thread each; contenders in turn (A B C A B C), a barrier before each call, of each call
the slower rank's time; "CPU" is the processor time of both ranks, which other load hardly changes. "ours" is
a tensor from anywhere, "ours, allocated" one from `Communicator.allocate`, as gradient buckets are.
All-gathers have this rank's part in the output already, as ds-zero's have. `memcpy` copies as many bytes
on both ranks at once: the limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Run = Callable[[], object]
DTYPES = ("float32", "bfloat16")
_BUDGET_MB = 6000  # moved by one contender at one size


def contenders(numel: int, dtype: Any) -> dict[tuple[str, str], Callable[[], Run]]:
    """(op, contender) -> what makes the inputs, outside of the measured time, and gives the call."""
    import torch
    import torch.distributed as dist

    from ds_core.ground.accelerator import Accelerator
    from ds_core.ground.mesh import Topology
    from ds_core.ground.routes import native_all_gather, native_reduce_scatter

    ours = Topology().build(Accelerator(torch.device("cpu"))).communicator("dp_shard", "reduce")
    assert ours.route == "shared memory", ours.route  # type: ignore[attr-defined]
    os.environ["DS_SHM"] = "0"
    plain = Topology().build(Accelerator(torch.device("cpu"))).communicator("dp_shard", "reduce")
    group, world = plain.group, plain.world  # type: ignore[attr-defined]
    whole, other = torch.ones(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    part, mine = torch.zeros(numel // world, dtype=dtype), other.view(world, -1)[plain.rank]
    kept, spread = (ours.allocate(numel, dtype).fill_(1) for _ in range(2))
    kept_mine = spread.view(world, -1)[plain.rank]

    def lent(use: Callable[[Any], Any], size: int) -> Callable[[], Run]:
        """A buffer that is dropped once it is sent, as gradient buckets are."""

        def make() -> Run:
            held = [ours.allocate(size, dtype).fill_(1)]
            return lambda: use(held.pop()).wait()

        return make

    def call(run: Run) -> Callable[[], Run]:
        return lambda: run

    made: dict[tuple[str, str], Callable[[], Run]] = {
        ("memcpy", "memcpy"): call(lambda: other.copy_(whole)),
        ("all_reduce", "ours"): call(lambda: ours.all_reduce(whole).wait()),
        ("all_reduce", "ours, allocated"): call(lambda: ours.all_reduce(kept).wait()),
        ("all_reduce", "gloo"): call(lambda: dist.all_reduce(whole, group=group)),
        ("reduce_scatter", "ours"): call(lambda: ours.reduce_scatter(part, whole).wait()),
        ("reduce_scatter", "ours, allocated"): lent(lambda full: ours.reduce_scatter(part, full), numel),
        ("reduce_scatter", "gloo"): call(lambda: native_reduce_scatter(part, whole, group).wait()),
        ("reduce_scatter", "sockets, ds-core's route"): call(
            lambda: plain.reduce_scatter(part, whole).wait()
        ),
        ("all_gather", "ours"): call(lambda: ours.all_gather(other, mine).wait()),
        ("all_gather", "ours, allocated"): call(lambda: ours.all_gather(spread, kept_mine).wait()),
        ("all_gather", "gloo"): call(lambda: native_all_gather(other, mine, group).wait()),
        ("all_gather", "sockets, ds-core's route"): call(lambda: plain.all_gather(other, mine).wait()),
        ("all_to_all", "ours"): call(lambda: ours.all_to_all(other, whole).wait()),
        ("all_to_all", "ours, allocated"): lent(lambda full: ours.all_to_all(other, full), numel),
        ("all_to_all", "gloo"): call(lambda: dist.all_to_all_single(other, whole, group=group)),
    }
    if _deepspeed() is None:
        import deepspeed.comm

        sent = torch.ones(numel, dtype=dtype)
        made["all_reduce", "deepspeed"] = call(lambda: deepspeed.comm.inference_all_reduce(sent))
    return made


def _deepspeed() -> str | None:
    """Why DeepSpeed's all-reduce through shared memory cannot be had, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    import deepspeed.comm
    import torch

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    if not hasattr(torch.ops.deepspeed, "inference_all_reduce_"):
        return "deepspeed's shm_comm op is not built"
    return None


def rank_main(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    absent = _deepspeed()
    found = []
    for name in DTYPES:
        dtype = getattr(torch, name)
        for megabytes in args.megabytes:
            numel = int(megabytes * 2**20) // dtype.itemsize // 64 * 64
            os.environ["DS_SHM"] = "1"
            made = contenders(numel, dtype)
            rounds = max(3, min(args.rounds, int(_BUDGET_MB / megabytes)))
            times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in made}
            for number in range(rounds + 2):
                for key, make in made.items():
                    run = make()
                    dist.barrier()
                    began, cpu = time.perf_counter(), time.process_time()
                    run()
                    took = time.perf_counter() - began, time.process_time() - cpu
                    if number > 1:
                        times[key].append(took)
            for (op, contender), each in times.items():
                found.append(
                    {"dtype": name, "mb": megabytes, "op": op, "contender": contender, "seconds": each}
                )
            del made
    Path(args.rank_out).write_text(json.dumps({"found": found, "absent": absent}))
    dist.barrier()
    os._exit(0)  # some peers hang in their own shutdown


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ranks, outs = [], [Path(folder) / f"{rank}.json" for rank in range(2)]
        for rank, out in enumerate(outs):
            environ = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
                "GLOO_SOCKET_IFNAME": "lo", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }  # fmt: skip
            command = [sys.executable, str(HERE / "shm.py"), "--rank-out", str(out), "--rounds"]
            command += [str(args.rounds), "--megabytes", *map(str, args.megabytes)]
            ranks.append(subprocess.Popen(command, env=environ))
        codes = [process.wait(args.timeout) for process in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        first, second = (json.loads(out.read_text()) for out in outs)
    rows = []
    for a, b in zip(first["found"], second["found"], strict=True):
        both = list(zip(a.pop("seconds"), b["seconds"], strict=True))
        seconds = [max(one[0], other[0]) for one, other in both]
        median = statistics.median(seconds)
        rows.append(
            {
                **a,
                "rounds": len(seconds),
                "ms_median": round(1e3 * median, 4),
                "cpu_ms_median": round(1e3 * statistics.median(one[1] + other[1] for one, other in both), 4),
                "ms_min": round(1e3 * min(seconds), 4),
                "gb_per_s_median": round(a["mb"] * 2**20 / median / 1e9, 3),
            }
        )
    return rows, first["absent"]


def report(rows: list[dict[str, Any]]) -> None:
    median = {(r["dtype"], r["mb"], r["op"], r["contender"]): r["ms_median"] for r in rows}
    print(
        f"{'':10}{'MB':>6} {'op':15}{'contender':27}{'ms':>9}{'CPU':>8}{'GB/s':>8}"
        f"{'x gloo':>8}{'x deepspeed':>13}"
    )
    for row in rows:
        here = row["dtype"], row["mb"], row["op"]
        ratios = [
            median[(*here, peer)] / row["ms_median"] if (*here, peer) in median else float("nan")
            for peer in ("gloo", "deepspeed")
        ]
        print(
            f"{row['dtype']:10}{row['mb']:6g} {row['op']:15}{row['contender']:27}{row['ms_median']:9.3f}"
            f"{row['cpu_ms_median']:8.2f}{row['gb_per_s_median']:8.2f}{ratios[0]:8.2f}{ratios[1]:13.2f}"
        )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=40, help="at most; fewer of the large sizes")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}-shm.json")
    parser.add_argument("--rank-out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_out:
        rank_main(args)
        return
    import torch

    before = os.getloadavg()[0]
    rows, absent = measure(args)
    if absent:
        print(f"skipped deepspeed: {absent}", file=sys.stderr)
    report(rows)
    record = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {processor()}",
        "torch": torch.__version__,
        "load_before": before,
        "skipped": {"deepspeed": absent} if absent else {},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
