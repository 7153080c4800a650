"""Training steps on a slow network: namespaces of this machine, joined at 100 Mbit/s, 1 and 10 Gbit/s. Root.

    sudo python packages/ds-comm/benchmarks/network.py --rates 100mbit,1gbit,10gbit
    sudo python packages/ds-comm/benchmarks/network.py --ranks 4 --per-node 2 --rates 1gbit

Each sample is a fresh process for every rank: warm-up steps, then timed ones between barriers; contenders
take turns (A B C A B C). Prints a table for each rate and, with `--out`, appends JSON lines: tokens, seconds
(medians), the bytes per step that left a node as its kernel counted them, and for ours those that the
communicators say they sent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# Programs import each other by path: the model, data and peers of ds-zero's step.py, the network of tools/.
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "ds-zero" / "benchmarks"), str(ROOT / "tools")]

import sample  # noqa: E402
import torch  # noqa: E402
from contenders import Absent, Setting  # noqa: E402
from wires import CONTENDERS  # noqa: E402

import netns  # noqa: E402
from netns_plan import Link, parse_rate  # noqa: E402

Figures = dict[str, Any]


# -- a rank --------------------------------------------------------------------------------------------------


def node_bytes(device: str) -> int:
    """What has left this node through a device, headers included."""
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


def rank_main(args: argparse.Namespace) -> None:
    """One rank of one sample; every rank tells its figures."""
    import torch.distributed as dist
    from gpt import build

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(args.size)
    try:
        entry = CONTENDERS[args.rank_of](model, Setting(world, args.accumulate, args.dtype == "bf16"))
    except Absent as reason:
        sample.tell({"absent": str(reason)})
        os._exit(0)
    clocks = {
        "seconds": time.perf_counter,
        "cpu": sample.cpu_seconds,
        "sent": lambda: node_bytes(os.environ["GLOO_SOCKET_IFNAME"]),
        "inside": lambda: node_bytes("lo"),
    }
    log = entry.log
    if log is not None:
        clocks["logged"] = lambda: sum(log.sent_bytes.values())
    times = sample.time_steps(
        entry.step,
        sample.micro_batches(args.size, args.accumulate, rank),
        clocks,
        warmup=max(args.warmup, entry.warmup),
        steps=math.ceil(args.steps / entry.period) * entry.period,
    )
    sample.tell({name: periods(values, entry.period) for name, values in times.items() if values})
    dist.barrier()
    os._exit(0)  # some peers hang in their own shutdown


def periods(values: list[float], length: int) -> list[float]:
    """The mean of every `length` steps: traffic that comes in some of them only is spread over all."""
    return [sum(values[at : at + length]) / length for at in range(0, len(values), length)]


# -- samples -------------------------------------------------------------------------------------------------


def one_sample(network: netns.Network, name: str, args: argparse.Namespace) -> Figures:
    """All ranks of one contender; a row of lists, one value for each period, or why there is none."""
    command = [sys.executable, str(HERE / "network.py"), "--rank-of", name, "--size", args.size]
    command += ["--dtype", args.dtype, "--accumulate", str(args.accumulate)]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "DS_TIMEOUT_S": str(args.timeout),
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # namespaces have no names for addresses, and torch says so
    }
    lines: list[list[str]] = [[] for _ in range(args.ranks)]
    outcome = network.run(
        command,
        lambda rank, line: lines[rank].append(line),
        per_node=args.per_node,
        environ=environ,
        timeout_s=args.timeout,
    )
    told = [sample.told(rank_lines) for rank_lines in lines]
    ranks = [figures for figures in told if figures is not None]
    for figures in ranks:
        if "absent" in figures:
            return figures
    if outcome.failure or len(ranks) < args.ranks:
        said = [line for rank_lines in lines for line in rank_lines if line.strip()]
        return {"failed": f"{outcome.failure or 'a rank told nothing'}: {said[-1][:200] if said else ''}"}
    # Ranks pass the same barriers, so rank 0's seconds are everybody's; of bytes the most that any sent.
    found = dict(ranks[0])
    for key in ("sent", "inside", "logged"):
        if key in found:
            found[key] = [max(values) for values in zip(*(figures[key] for figures in ranks), strict=True)]
    return found


def summarise(name: str, samples: list[Figures], args: argparse.Namespace) -> Figures:
    """Medians over all periods of all samples."""
    middle = {
        key: statistics.median(value for figures in samples for value in figures[key]) for key in samples[0]
    }
    seconds = [value for figures in samples for value in figures["seconds"]]
    tokens = args.ranks * args.accumulate * sample.SEQUENCE
    return {
        "contender": name,
        "tokens_per_s": round(tokens / middle["seconds"], 1),
        "step_s": {
            "best": round(min(seconds), 4),
            "median": round(middle["seconds"], 4),
            "worst": round(max(seconds), 4),
        },
        "cpu_s": round(middle["cpu"], 3),
        "update_s": round(middle["updates"], 4) if "updates" in middle else None,
        "node_sent_bytes": round(middle["sent"]),
        "inside_bytes": round(middle["inside"]),
        "logged_bytes": round(middle["logged"]) if "logged" in middle else None,
        "samples": len(samples),
    }


def at_rate(rate: str, names: list[str], args: argparse.Namespace) -> Figures:
    """All contenders on one network, in turn."""
    collected: dict[str, list[Figures]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    loads: list[float] = []
    with netns.Network(args.ranks // args.per_node, Link(parse_rate(rate), args.delay_ms)) as network:
        measured = network.measure()
        print(f"\n{rate}: {measured}", flush=True)
        for _ in range(args.rounds):
            for name in names:
                if name in skipped:
                    continue
                loads.append(os.getloadavg()[0])
                began = time.monotonic()
                figures = one_sample(network, name, args)
                reason = figures.get("absent") or figures.get("failed")
                if reason:
                    skipped[name] = reason
                    print(f"skipped {name}: {reason}", file=sys.stderr, flush=True)
                else:
                    collected[name].append(figures)
                    spent = time.monotonic() - began
                    step = statistics.median(figures["seconds"])
                    print(f"  {name}: {step:.3f} s a step, {spent:.0f} s in all", file=sys.stderr, flush=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": sample.machine(),
        "torch": torch.__version__,
        "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "rate": rate,
        "delay_ms": args.delay_ms,
        "measured_mbit": round(measured.rate_bits / 1e6, 1),
        "round_trip_ms": round(measured.round_trip_s * 1e3, 3),
        "size": args.size,
        "dtype": args.dtype,
        "accumulate": args.accumulate,
        "ranks": args.ranks,
        "per_node": args.per_node,
        "rounds": args.rounds,
        "steps": args.steps,
        "load_median": round(statistics.median(loads), 2),
        "skipped": skipped,
        "rows": [summarise(name, samples, args) for name, samples in collected.items() if samples],
    }


def report(record: Figures) -> None:
    rows = sorted(record["rows"], key=lambda row: -row["tokens_per_s"])
    plain = next((row["tokens_per_s"] for row in rows if row["contender"] == "DDP"), math.nan)
    nodes = record["ranks"] // record["per_node"]
    print(
        f"{record['size']} {record['dtype']} accumulate {record['accumulate']}, {record['ranks']} ranks on "
        f"{nodes} nodes at {record['rate']}, load {record['load_median']}"
    )
    titles = ("tokens/s", "x DDP", "step s", "cpu s", "update s", "sent MB", "logged MB")
    print(" " * 26 + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        tokens, sent, logged = row["tokens_per_s"], row["node_sent_bytes"], row["logged_bytes"]
        step, update = row["step_s"]["median"], row["update_s"]
        cells = [f"{tokens:.0f}", f"{tokens / plain:.2f}", f"{step:.3f}", f"{row['cpu_s']:.2f}"]
        cells += ["" if update is None else f"{update:.3f}", f"{sent / 1e6:.2f}"]
        cells += ["" if logged is None else f"{logged / 1e6:.2f}"]
        print(f"{row['contender']:26}" + "".join(f"{cell:>10}" for cell in cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="100mbit,1gbit,10gbit", help="of each node's link, with commas")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way, by netem")
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="names, with semicolons between")
    parser.add_argument("--size", default="30m", help="tiny, 30m or 125m")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a sample")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these; more where one needs them")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one sample")
    parser.add_argument("--out", type=Path, help="append a JSON line for each rate to this file")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.names = [name.strip() for name in args.contenders.split(";")]
    unknown = [name for name in args.names if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown contender {unknown[0]!r}; there are {'; '.join(CONTENDERS)}")
    if args.per_node < 1 or args.ranks % args.per_node:
        parser.error(f"--ranks {args.ranks} must be a multiple of --per-node {args.per_node}")
    try:
        for rate in args.rates.split(","):
            parse_rate(rate)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = parse()
    if args.rank_of:
        rank_main(args)
    netns.leave_on_signals()
    try:
        for rate in args.rates.split(","):
            record = at_rate(rate, args.names, args)
            report(record)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as lines:
                    lines.write(json.dumps(record) + "\n")
    except netns.Unavailable as reason:
        print(f"no slow network here: {reason}", file=sys.stderr)
        return netns.UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
