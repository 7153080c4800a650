"""Trains a GPT whose training state does not fit into memory, from a disk, and proves that nothing changed.

`python -m ds_offload.recipes.bigger_than_memory` on a laptop: the planner refuses 1.3 billion parameters in
6 GB and says what would fit; the same recipe with its state on disk trains within the budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ds_core.setup.estimate import DoesNotFit, Recipe, check_fits, estimate
from ds_core.state.store import Store
from ds_core.train.engine import Engine, StepReport
from ds_core.train.memory import gigabytes
from ds_core.train.optim import ShardedOptimizer
from ds_kernels import FusedAdamW
from ds_offload.measure import measure_bandwidths, predict_update
from ds_offload.recipes.story import draw
from ds_offload.recipes.watch import Watch, memory
from ds_offload.store import TieredStore
from ds_zero.recipes.data import Windows, read_corpus, read_tokenizer, token_stream, write_tokenizer
from ds_zero.recipes.model import GPT, GPTConfig
from ds_zero.zero import Zero

VOCAB = 4096
_SAID = {True: "equal, bit for bit", False: "NOT EQUAL"}
EVERYTHING = dict.fromkeys(("params", "grads", "masters", "moments"), "nvme")


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the memory in which it shall train."""

    dim: int
    layers: int
    heads: int
    hidden: int
    budget: float  # bytes


SIZES = {
    "2m": Size(128, 4, 4, 384, 1.0e9),
    "350m": Size(1024, 27, 16, 2752, 1.5e9),
    "1.3b": Size(2048, 25, 16, 5632, 6.0e9),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One step, as it is reported. `seconds` of forward, backward and step."""

    loss: float
    grad_norm: float
    seconds: tuple[float, float, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Tell the story; 0 when the budget held and the small twin was equal, 1 when not, 2 for bad flags."""
    args = _parse(argv)
    console = Console()
    size = SIZES[args.size]
    budget = args.memory * 1e9 if args.memory else size.budget
    folder = Path(args.out or f"runs/bigger_than_memory-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    windows = _text(folder, args.seq)
    config = _config(size, args.seq)
    numel = _numel(config)
    states = estimate(numel, ranks=1, stage=3, recipe=Recipe("bfloat16")).states
    console.print(
        f"A GPT of {numel:,} parameters; bf16 with fp32 masters and AdamW: {gigabytes(states)} of training "
        f"state. Memory for this process: {gigabytes(budget)}. Disk: {args.disk}"
    )
    try:
        _ask(config, budget, None)
    except DoesNotFit as refusal:
        console.print(f"\n[bold]Without offload the planner refuses:[/bold]\n{refusal}\n", highlight=False)
    else:
        console.print("It fits without a disk, and is trained from one all the same.")
    equal = prove_equal(args.disk, windows, args.seq)
    console.print(f"A small twin, from memory and from disk, step for step: {_SAID[equal]}")
    _ask(config, budget, _store(args.disk))
    predicted = predict(args.disk, numel, console)
    outcomes, watch, plan = train(config, args.disk, windows, args.steps, console)
    peak = memory()["VmHWM"]
    report = _report(args, numel, states, budget, outcomes)
    report |= {"peak_resident_bytes": peak, "twin_equal": equal, "predicted_update_s": predicted}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(watch.samples, budget=budget, states=states, file=folder / "bytes.png")
    (folder / "plan.txt").write_text(plan + "\n")
    console.print(_table(report))
    console.print(
        f"{folder}/: report.json, bytes.png (bytes by tier over time), plan.txt (the order of the update)"
    )
    if peak > budget:
        console.print(f"[bold red]the budget was exceeded by {gigabytes(peak - budget)}[/bold red]")
    return 0 if equal and peak <= budget else 1


def train(
    config: GPTConfig, disk: str, windows: Windows, steps: int, console: Console
) -> tuple[list[Outcome], Watch, str]:
    """The big model: state on disk, one unit of it in memory at a time."""
    named = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*named, TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    store, outcomes = _store(disk), list[Outcome]()
    with Watch(store) as watch, Progress(*columns, console=console) as progress:
        task = progress.add_task("building on disk", total=None, said="")
        engine = _engine(config, store)
        progress.update(task, description="training from disk", total=steps)
        for ids_BT, targets_BT in _batches(windows, steps):
            outcomes.append(_step(engine, ids_BT, targets_BT))
            said = f"loss {outcomes[-1].loss:.3f}  memory {gigabytes(memory()['VmRSS'])}"
            progress.update(task, advance=1, said=said)
            progress.console.print(_line(len(outcomes), outcomes[-1]), highlight=False)
        plan = str(engine.optimizer.elsewhere.plan)
    store.close()
    return outcomes, watch, plan


def prove_equal(disk: str, windows: Windows, seq: int, steps: int = 3) -> bool:
    """The same small model trained twice, all in memory and all on disk: losses, norms and masters."""
    config = _config(SIZES["2m"], seq)
    found = []
    for store in (None, _store(disk, chunk_numel=1 << 16)):
        torch.manual_seed(1)
        engine = _engine(config, store)
        rows = [_step(engine, *batch) for batch in _batches(windows, steps)]
        masters = [unit.values().detach().clone() for unit in engine.owner.trainable]
        found.append(([(row.loss, row.grad_norm) for row in rows], masters))
        if store is not None:
            store.close()
    (rows_a, masters_a), (rows_b, masters_b) = found
    return rows_a == rows_b and all(map(torch.equal, masters_a, masters_b))


def predict(disk: str, numel: int, console: Console) -> float:
    """Seconds of one update, from what this disk and this processor do in a second or two."""
    store = _store(disk)
    bandwidths = measure_bandwidths(store.volume, _adamw)
    chunks = -(-numel // store.policy.chunk_numel)
    # Master, gradient and two moments are read; master, moments and a bf16 shard are written.
    seconds = predict_update(numel, 16 * numel, 14 * numel, bandwidths, chunks=chunks)
    store.close()
    console.print(f"{bandwidths}. One update should take {seconds:.1f} s", highlight=False)
    return seconds


def _adamw(params: Any) -> FusedAdamW:
    return FusedAdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)


def _engine(config: GPTConfig, store: Store | None) -> Any:
    with torch.device("meta"):
        model = GPT(config)
    owner = Zero(stage=3, dtype="bfloat16").shard(model, store=store)
    optimizer = _adamw(model.parameters())
    return Engine(model, owner, ShardedOptimizer(optimizer, owner), max_norm=1.0)


def _step(engine: Any, ids_BT: Tensor, targets_BT: Tensor) -> Outcome:
    times = [time.perf_counter()]
    loss = engine(ids_BT, targets_BT)
    times.append(time.perf_counter())
    engine.backward(loss)
    times.append(time.perf_counter())
    report: StepReport = engine.step()
    times.append(time.perf_counter())
    laps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Outcome(report.loss, report.grad_norm, (laps[0], laps[1], laps[2]))


def _store(disk: str, **settings: Any) -> TieredStore:
    return TieredStore(nvme=disk, params="nvme", grads="nvme", masters="nvme", moments="nvme", **settings)


def _batches(windows: Windows, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        yield windows.batch([step % len(windows)])


def _config(size: Size, seq: int) -> GPTConfig:
    return GPTConfig(
        VOCAB, size.dim, size.layers, size.heads, size.hidden, seq=seq, checkpoint_activations=True
    )


def _meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def _numel(config: GPTConfig) -> int:
    return sum(param.numel() for param in _meta(config).parameters())


def _ask(config: GPTConfig, budget: float, store: TieredStore | None) -> None:
    """Raises DoesNotFit with the estimate."""
    model = _meta(config)
    shares = None if store is None else store.shares(torch.device("cpu"))
    largest = max(config.vocab * config.dim, sum(p.numel() for p in model.layers[0].parameters()))
    recipe = Recipe("bfloat16", "float32")
    check_fits(model, ranks=1, stage=3, available=budget, recipe=recipe, largest_unit=largest, shares=shares)
    if store is not None:
        store.close()


def _text(folder: Path, seq: int) -> Windows:
    corpus, file = read_corpus(), folder / "tokenizer.json"
    write_tokenizer("bpe", corpus, VOCAB, file)
    return Windows(token_stream(read_tokenizer("bpe", file), corpus.train[:200]), seq)


def _line(number: int, outcome: Outcome) -> str:
    forward, backward, step = outcome.seconds
    return (
        f"step {number}: loss {outcome.loss:.4f}, norm {outcome.grad_norm:.2f}; forward {forward:.1f} s, "
        f"backward {backward:.1f} s, update {step:.1f} s"
    )


def _report(
    args: argparse.Namespace, numel: int, states: float, budget: float, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    return {
        "parameters": numel,
        "states_bytes": states,
        "budget_bytes": budget,
        "sequence": args.seq,
        "steps": [asdict(outcome) for outcome in outcomes],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="bigger than memory")
    table.add_column("what")
    table.add_column("figure", justify="right")
    steps = report["steps"]
    last = steps[-1]["seconds"]
    rows = [
        ("parameters", f"{report['parameters']:,}"),
        ("training state at 16 bytes", gigabytes(report["states_bytes"])),
        ("budget", gigabytes(report["budget_bytes"])),
        ("peak memory of the process", gigabytes(report["peak_resident_bytes"])),
        ("loss, first and last step", f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"),
        ("last step: forward / backward / update", " / ".join(f"{lap:.1f} s" for lap in last)),
        ("update, predicted at the start", f"{report['predicted_update_s']:.1f} s"),
        ("tokens per second", f"{report['sequence'] / sum(last):.1f}"),
        ("small twin from memory and disk", _SAID[report["twin_equal"]]),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bigger_than_memory", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="1.3b", help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--disk", default=".", help="folder on a fast disk; its file has no name (default: here)"
    )
    parser.add_argument("--memory", type=float, help="budget in GB (default: 6 for 1.3b, 1.5 for 350m)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the report (default: runs/bigger_than_memory-DATE-TIME)")
    args = parser.parse_args(argv)
    for name in ("steps", "seq"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; give at least 1")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bigger_than_memory: {error}")
