"""Draws a loss curve twice: with Braille dots in the terminal, and as a PNG where matplotlib is installed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

Point = tuple[float, float]

_BRAILLE = 0x2800
# bit of the dot in column x (0, 1) and row y (0 top ... 3) of a Braille character
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Each y averaged with up to `window` - 1 of the y before it."""
    out, total = [], 0.0
    for at, (x, y) in enumerate(points):
        total += y - (points[at - window][1] if at >= window else 0.0)
        out.append((x, total / min(at + 1, window)))
    return out


def terminal_plot(points: Sequence[Point], width: int = 60, height: int = 12, title: str = "") -> str:
    """The points as lines of text: [height] rows of `width` Braille characters, with both axes labelled."""
    if not points:
        return "(no points)"
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    cells = [[0] * width for _ in range(height)]
    for x, y in _joined(points, (high_x - low_x) / (2 * width)):
        dot_x = _scaled(x, low_x, high_x, 2 * width)
        dot_y = 4 * height - 1 - _scaled(y, low_y, high_y, 4 * height)
        cells[dot_y // 4][dot_x // 2] |= _DOTS[dot_x % 2][dot_y % 4]
    labels = {0: f"{high_y:.2f}", height - 1: f"{low_y:.2f}"}
    margin = max(map(len, labels.values()))
    lines = [f"{'':{margin}}  {title}"] if title else []
    for row, cell in enumerate(cells):
        lines.append(f"{labels.get(row, ''):>{margin}} │{''.join(chr(_BRAILLE | bits) for bits in cell)}")
    lines.append(f"{'':{margin}} └{'─' * width}")
    ends = f"{low_x:g}", f"step {high_x:g}"
    lines.append(f"{'':{margin}}  {ends[0]}{ends[1]:>{width - len(ends[0])}}")
    return "\n".join(lines)


def _joined(points: Sequence[Point], gap: float) -> list[Point]:
    """The points, and between any two further apart than `gap` in x as many more as make a line of dots."""
    out = [points[0]]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        num = math.ceil((x1 - x0) / gap) if gap else 1
        out += [(x0 + (x1 - x0) * i / num, y0 + (y1 - y0) * i / num) for i in range(1, num + 1)]
    return out


def _scaled(value: float, low: float, high: float, num_dots: int) -> int:
    share = (value - low) / (high - low) if high > low else 0.0
    return min(num_dots - 1, int(share * num_dots))


def png_plot(points: Sequence[Point], marks: Sequence[tuple[float, str]], file: Path) -> str | None:
    """Write the curve, its average, and a labelled line at each mark. Returns why not, or None."""
    if find_spec("matplotlib") is None:
        return "no PNG: matplotlib is not installed (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
    window = max(1, len(points) // 25)
    axes.plot(*zip(*smooth(points, window), strict=True), color="tab:blue", label=f"mean of {window} steps")
    for step, label in marks:
        axes.axvline(step, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(label, (step, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(file, dpi=120)
    return None
