"""One training step with state elsewhere: ours by tier, and DeepSpeed's CPU and NVMe offload, interleaved.

Each sample is a fresh process: warm-up steps, then timed ones; rounds go A B C A B C. The losses of ours must
equal those of training in memory. `python peers.py --disk FOLDER --size 30m` prints JSON lines; `--write`
keeps them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from update import machine

HERE = Path(__file__).parent
SEQUENCE, VOCAB = 256, 4096
Step = Callable[[Tensor], float]


class Absent(Exception):
    """A contender that cannot run here, and why."""


def build(size: str) -> Any:
    from ds_zero.recipes.model import GPT, gpt_config

    torch.manual_seed(0)
    return GPT(gpt_config(size, VOCAB, seq=SEQUENCE, checkpoint_activations=False))


def ours(size: str, disk: str, *, stage: int = 3, **tiers: Any) -> Step:
    from ds_core.train.engine import Engine
    from ds_core.train.optim import ShardedOptimizer
    from ds_kernels import FusedAdamW
    from ds_offload import TieredStore
    from ds_zero.zero import Zero

    model = build(size)
    store = TieredStore(nvme=disk, **tiers) if tiers else None
    owner = Zero(stage=stage, dtype="bfloat16").shard(model, store=store)
    optimizer = FusedAdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    engine: Any = Engine(model, owner, ShardedOptimizer(optimizer, owner), max_norm=1.0)

    def step(ids: Tensor) -> float:
        engine.backward(engine(ids[:, :-1], ids[:, 1:]))
        return float(engine.step().loss)

    return step


def deepspeed(size: str, disk: str, *, stage: int, optimizer: str, params: str = "none") -> Step:
    if importlib.util.find_spec("deepspeed") is None:
        raise Absent("deepspeed is not installed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    import deepspeed as peer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    peer.init_distributed(dist_backend="gloo", verbose=False)
    model = build(size).to(torch.bfloat16)
    zero: dict[str, Any] = {
        "stage": stage,
        "offload_optimizer": {
            "device": optimizer, "nvme_path": disk, "pipeline_read": True, "pipeline_write": True,
            "buffer_count": 5, "pin_memory": optimizer == "nvme",
        },
    }  # fmt: skip
    if params != "none":
        zero["offload_param"] = {"device": params, "nvme_path": disk, "pin_memory": params == "nvme"}
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "aio": {"block_size": 1 << 20, "queue_depth": 64, "intra_op_parallelism": 2, "single_submit": False},
    }  # fmt: skip
    engine, *_ = peer.initialize(
        model=model, optimizer=DeepSpeedCPUAdam(model.parameters(), lr=1e-4, weight_decay=0.0), config=config
    )

    def step(ids: Tensor) -> float:
        loss = engine(ids[:, :-1], ids[:, 1:])
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


_ALL = {"params": "nvme", "grads": "nvme", "masters": "nvme", "moments": "nvme"}
CONTENDERS: dict[str, Callable[[str, str], Step]] = {
    "in memory": lambda size, disk: ours(size, disk),
    "ours, host": lambda size, disk: ours(size, disk, masters="host", moments="host", grads="host"),
    "ours 2, host": lambda size, disk: ours(
        size, disk, stage=2, masters="host", moments="host", grads="host"
    ),
    "ours, optimizer on disk": lambda size, disk: ours(
        size, disk, masters="nvme", moments="nvme", grads="host"
    ),
    "ours, all on disk": lambda size, disk: ours(size, disk, **_ALL),
    "deepspeed 2, cpu": lambda size, disk: deepspeed(size, disk, stage=2, optimizer="cpu"),
    "deepspeed 3, cpu": lambda size, disk: deepspeed(size, disk, stage=3, optimizer="cpu", params="cpu"),
    "deepspeed 3, optimizer nvme": lambda size, disk: deepspeed(size, disk, stage=3, optimizer="nvme"),
    "deepspeed 3, all nvme": lambda size, disk: deepspeed(
        size, disk, stage=3, optimizer="nvme", params="nvme"
    ),
}


def sample(args: argparse.Namespace) -> None:
    """One contender in this process; its figures are the last line."""
    torch.set_num_threads(args.threads)
    try:
        step = CONTENDERS[args.contender](args.size, args.disk)
    except Absent as reason:
        print("@" + json.dumps({"absent": str(reason)}))
        return
    generator = torch.Generator().manual_seed(1)
    losses, laps = [], []
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(0, VOCAB, (1, SEQUENCE + 1), generator=generator)
        began = time.perf_counter()
        losses.append(step(ids))
        laps.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print("@" + json.dumps({"laps": laps[args.warmup :], "losses": losses, "peak_bytes": peak}), flush=True)
    os._exit(0)  # peers' threads at exit are not what is measured


def main() -> None:
    args = parse()
    if args.contender:
        sample(args)
        return
    chosen = [name for name in CONTENDERS if not args.only or name in args.only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name in chosen:
            found[name].append(fresh(args, name))
    reference = next((s["losses"] for s in found.get("in memory", []) if "losses" in s), None)
    rows = [{"case": f"step {args.size}", "contender": n, **summary(s, reference)} for n, s in found.items()]
    for row in rows:
        row |= machine(args)
        print(json.dumps(row))
    if args.write:
        with (HERE / "results" / "peers.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def fresh(args: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [
        *(
            sys.executable,
            str(HERE / "peers.py"),
            "--contender",
            name,
            "--size",
            args.size,
            "--disk",
            args.disk,
        ),
        *("--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"absent": f"took longer than {args.limit} s"}
    told = [line for line in done.stdout.splitlines() if line.startswith("@")]
    if not told:
        return {"absent": f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}"}
    result: dict[str, Any] = json.loads(told[-1][1:])
    return result


def summary(samples: list[dict[str, Any]], reference: list[float] | None) -> dict[str, Any]:
    good = [s for s in samples if "laps" in s]
    if not good:
        return {"absent": samples[0].get("absent", "no sample")}
    laps = [lap for s in good for lap in s["laps"]]
    return {
        "step_s": {"best": round(min(laps), 3), "median": round(statistics.median(laps), 3)},
        "peak_MB": round(max(s["peak_bytes"] for s in good) / 1e6),
        "losses_equal_memory": reference is not None and all(s["losses"] == reference for s in good),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", default=".")
    parser.add_argument("--size", default="30m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=300, help="seconds for one sample")
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="append to results/peers.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
