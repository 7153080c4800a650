"""Does it learn as well? A small GPT on local text by compressed optimizers and by those they stand for.

    python packages/ds-comm/benchmarks/convergence.py --out packages/ds-comm/benchmarks/results/convergence
    python packages/ds-comm/benchmarks/convergence.py --steps 60 --seeds 0 --contenders adamw,onebit-adam

The model, text and tokens of ds_zero.recipes.train_gpt; the same batches, seeds and learning rates for every
contender, real ranks at stage 0. Prints the held-out loss (nats per byte, mean over seeds) beside that of the
contender it stands for, the bytes that a rank sent, and how many times less that is than for AdamW. With
`--out` writes FILE.json and FILE.png, the curves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_comm import (
    Int4,
    Int8,
    LoCo,
    OnebitAdam,
    OnebitLamb,
    ZeroOneAdam,
    ZeroOneSchedule,
)
from ds_comm.compressing import Mode
from ds_core import ShardedOptimizer
from ds_core.state.owner import FlatOwner, ReplicatedOwner
from ds_core.testing.distributed import run_ranks
from ds_core.train.clip import clip_grad_norm_
from ds_kernels import FusedLamb
from ds_zero.recipes.data import ByteTokenizer, Corpus, Heldout, Windows, read_corpus, token_stream
from ds_zero.recipes.model import GPT, gpt_config

Result = dict[str, Any]
Build = Callable[[list[nn.Parameter], int], Any]  # parameters, steps of the run -> optimizer

FREEZE = 0.15  # share of the steps that are warm-up, as in the papers' runs
ADAM: Mapping[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.1}
LAMB: Mapping[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}
PEAK = {"adam": 2e-3, "lamb": 1e-2}
CLIP = 1.0
POINTS = 12  # of a curve
_TRAIN_BYTES, _HELDOUT_BYTES = 4 << 20, 1 << 16


def adamw(params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=PEAK["adam"], **ADAM)


def onebit_adam(params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    return OnebitAdam(params, lr=PEAK["adam"], freeze_step=round(FREEZE * steps), **ADAM)


def zero_one_adam(params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    """Refreshes in the first half at ever longer intervals; then pairs of steps, and fours."""
    schedule = ZeroOneSchedule(
        steps // 2,
        var_update_scaler=max(1, steps // 32),
        local_step_scaler=max(1, steps // 6),
        local_step_clipper=4,
    )
    return ZeroOneAdam(params, lr=PEAK["adam"], schedule=schedule, **ADAM)


def lamb(params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    return FusedLamb(params, lr=PEAK["lamb"], **LAMB)


def onebit_lamb(params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    return OnebitLamb(params, lr=PEAK["lamb"], freeze_step=round(FREEZE * steps), **LAMB)


# name -> (what it stands for, the optimizer, how gradients travel without a route of its own)
CONTENDERS: Mapping[str, tuple[str, Build, Callable[[], Any]]] = {
    "adamw": ("adamw", adamw, lambda: None),
    "onebit-adam": ("adamw", onebit_adam, lambda: None),
    "zero-one-adam": ("adamw", zero_one_adam, lambda: None),
    "int8": ("adamw", adamw, Int8),
    "loco": ("adamw", adamw, lambda: LoCo(Int4())),
    "lamb": ("lamb", lamb, lambda: None),
    "onebit-lamb": ("lamb", onebit_lamb, lambda: None),
}


# -- a rank --------------------------------------------------------------------------------------------------


def train(rank: int, world: int, contender: str, seed: int, job: Mapping[str, Any]) -> Result:
    """One run: the curve as [step, nats per byte], and the bytes that this rank sent for its gradients."""
    steps, seq = job["steps"], job["seq"]
    windows, heldout = _text(read_corpus(Path(job["data"]) if job["data"] else None), seq)
    torch.manual_seed(seed)
    model = GPT(gpt_config(job["size"], ByteTokenizer.vocab, seq=seq))
    _, build, reduce = CONTENDERS[contender]
    optimizer = build(list(model.parameters()), steps)
    wire = getattr(optimizer, "route", None) or reduce()
    owner: FlatOwner = ReplicatedOwner(model, reduce=wire)
    ShardedOptimizer(optimizer, owner)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    chosen = torch.Generator().manual_seed(1000 + seed)
    curve, sent = [], 0
    for step in range(1, steps + 1):
        picked = torch.randint(len(windows), (world, job["batch"]), generator=chosen)[rank].tolist()
        owner.mesh.log.clear()
        model(*windows.batch(picked)).backward()
        if getattr(optimizer, "mode", Mode.PLAIN) is Mode.PLAIN:  # else the norm would be the momentum's
            clip_grad_norm_(optimizer, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log = owner.mesh.log.sent_bytes
        sent += sum(bytes_ for (_, op), bytes_ in log.items() if op != "broadcast")
        if step % max(1, steps // POINTS) == 0 or step == steps:
            curve.append([step, _heldout(model, heldout, owner, rank, world)])
    return {"curve": curve, "sent_bytes": sent, "numel": sum(p.numel() for p in model.parameters())}


def _pace(step: int, steps: int) -> float:
    """Linear over a twentieth, then half a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


def _text(corpus: Corpus, seq: int) -> tuple[Windows, Heldout]:
    tokenizer = ByteTokenizer()
    text = corpus.heldout_sample(_HELDOUT_BYTES)
    held = Heldout.cut(
        b"".join(document.text.encode() for document in text),
        token_stream(tokenizer, text),
        seq,
        tokenizer.file_mark,
    )
    size, chosen = 0, []
    for document in corpus.train:
        if size < _TRAIN_BYTES:
            chosen.append(document)
            size += len(document.text)
    return Windows(token_stream(tokenizer, chosen), seq), held


@torch.no_grad()
def _heldout(model: nn.Module, held: Heldout, owner: FlatOwner, rank: int, world: int) -> float:
    """Nats per byte, of all ranks' shares of the text. Collective."""
    model.eval()
    total = torch.zeros(1, dtype=torch.float64)
    for at in range(rank, len(held.ids_NT), 64 * world):
        rows = slice(at, at + 64 * world, world)
        total += float(model(held.ids_NT[rows], held.targets_NT[rows], reduction="sum"))
    model.train()
    owner.control.all_reduce(total, about="held-out nats").wait()
    return float(total) / len(held.text)


# -- all runs ------------------------------------------------------------------------------------------------


def summarize(results: Mapping[str, Sequence[Result]]) -> list[Result]:
    """A row for each contender: final loss, how far from its counterpart's, and bytes beside AdamW's."""
    rows = []
    for name, runs in results.items():
        final = statistics.mean(run["curve"][-1][1] for run in runs)
        row: Result = {"contender": name, "loss": final, "sent_bytes": runs[0]["sent_bytes"]}
        counterpart = CONTENDERS[name][0]
        if counterpart in results:
            base = statistics.mean(run["curve"][-1][1] for run in results[counterpart])
            row["stands_for"], row["worse_by"] = counterpart, final / base - 1.0
        if "adamw" in results:
            row["times_less"] = results["adamw"][0]["sent_bytes"] / runs[0]["sent_bytes"]
        rows.append(row)
    return rows


def show(rows: Sequence[Result]) -> str:
    lines = [f"{'':14}{'held-out nats':>14}{'worse by':>10}{'MB sent':>10}{'times less':>12}"]
    for row in rows:
        worse = f"{100 * row['worse_by']:+.2f} %" if "worse_by" in row else ""
        less = f"{row['times_less']:.2f}" if "times_less" in row else ""
        lines.append(
            f"{row['contender']:14}{row['loss']:14.4f}{worse:>10}{row['sent_bytes'] / 1e6:10.2f}{less:>12}"
        )
    return "\n".join(lines)


def plot(results: Mapping[str, Sequence[Result]], file: Path) -> None:
    """Mean curves, each with the band of its seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, runs in results.items():
        steps = [point[0] for point in runs[0]["curve"]]
        values = torch.tensor([[point[1] for point in run["curve"]] for run in runs], dtype=torch.float64)
        (line,) = axes.plot(steps, values.mean(0).tolist(), label=name)
        low, high = _band(values)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _band(values: Tensor) -> tuple[list[float], list[float]]:
    return values.amin(0).tolist(), values.amax(0).tolist()


def main(argv: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--size", default="100k", help="of the model, as train_gpt names them")
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--data", default="", help="a file or folder of text; default: Python's library")
    parser.add_argument("--out", type=Path, help="FILE.json and FILE.png")
    args = parser.parse_args(argv)
    names = args.contenders.split(",")
    if strange := [name for name in names if name not in CONTENDERS]:
        parser.error(f"no contender {strange[0]!r}; there are {', '.join(CONTENDERS)}")
    job = {key: getattr(args, key) for key in ("steps", "size", "batch", "seq", "data")}
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            run = run_ranks(train, args.world, timeout=3600.0, contender=name, seed=seed, job=job)[0]
            results[name].append({"seed": seed, **run})
            print(f"seed {seed} {name}: {run['curve'][-1][1]:.4f}", flush=True)
    rows = summarize(results)
    print(show(rows))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "data")}
        found = {"settings": settings, "torch": torch.__version__, "rows": rows, "runs": results}
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        plot(results, args.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
