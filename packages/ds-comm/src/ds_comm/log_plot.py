"""The communication log as a picture: bytes and time of each axis and operation over the steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_comm.log_rows import StepRow

_FORMATS = ("png", "svg", "pdf")


def plot_steps(steps: Sequence[StepRow], path: Path) -> None:
    """Write `path` (.png, .svg or .pdf). Raises ValueError when there is nothing to show, LookupError without
    matplotlib."""
    if path.suffix.removeprefix(".") not in _FORMATS:
        raise ValueError(f"{path}: allowed are files that end in {', '.join(_FORMATS)}")
    if not steps:
        raise ValueError("the communication log has heard nothing yet: plot after a step")
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no backend, nobody's default changes
    except ImportError:
        raise LookupError("a plot needs matplotlib: pip install 'ds-comm[plot]'") from None
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _lines(top, steps, "sent_bytes", 1e6)
    _lines(bottom, steps, "waited_ms", 1.0)
    top.set_ylabel("MB sent by this rank, per step")
    bottom.set_ylabel("ms waited for, per step")
    bottom.set_xlabel("step")
    top.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _lines(axes: Any, steps: Sequence[StepRow], field: str, unit: float) -> None:
    known = sorted({row.step for row in steps})
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for row in steps:
        name = f"{row.axis} {row.op}" + (f" ({row.codec})" if row.codec else "")
        series[name][row.step] = getattr(row, field) / unit
    for name, values in sorted(series.items()):
        axes.plot(known, [values.get(step, 0.0) for step in known], marker=".", label=name)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
