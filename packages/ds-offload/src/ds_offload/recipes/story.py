"""What the recipe shows: the model's states beside the budget, and bytes by tier over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from ds_core.train.memory import gigabytes
from ds_offload.recipes.watch import Sample


def draw(samples: Sequence[Sample], *, budget: float, states: float, file: Path) -> None:
    """Bytes in memory and on disk over time, and the disk's traffic below, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    times = [sample.seconds for sample in samples]
    upper.plot(
        times, [s.tiers["nvme"] / 1e9 for s in samples], label="training state on disk", color="tab:green"
    )
    upper.plot(times, [s.resident / 1e9 for s in samples], label="memory of the process", color="tab:blue")
    upper.axhline(budget / 1e9, color="tab:red", linestyle="--", label=f"budget, {gigabytes(budget)}")
    upper.axhline(
        states / 1e9,
        color="tab:gray",
        linestyle=":",
        label=f"all in memory, {gigabytes(states)} without activations",
    )
    upper.set(ylabel="GB", ylim=(0, None))
    upper.legend(loc="center right")
    pairs = list(itertools.pairwise(samples))
    middle = [(a.seconds + b.seconds) / 2 for a, b in pairs]
    lower.plot(middle, [_rate(a, b, "read") for a, b in pairs], label="read", color="tab:blue", linewidth=1)
    lower.plot(
        middle, [_rate(a, b, "written") for a, b in pairs], label="written", color="tab:orange", linewidth=1
    )
    lower.set(xlabel="seconds", ylabel="GB/s", ylim=(0, None))
    lower.legend(loc="upper right")
    figure.savefig(file, dpi=120)


def _rate(before: Sample, after: Sample, name: str) -> float:
    span = max(1e-9, after.seconds - before.seconds)
    return float((getattr(after, name) - getattr(before, name)) / span / 1e9)
