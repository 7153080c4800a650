"""Says how training goes: one bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_LINE_EVERY_S = 5.0


class Progress:
    """Loss, tokens/s and time left over the whole run. Silent on ranks other than 0 (`show` False)."""

    def __init__(self, *, show: bool, plain: bool, stream: TextIO | None = None) -> None:
        self._show = show
        self._stream = stream or sys.stdout
        self._bar: Any = None
        self._task: Any = None
        self._said_at = 0.0
        self._first: tuple[int, float] | None = None  # (step, time) of the first step seen
        if show and not plain and self._stream.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task("train", total=None, loss="-", speed="-")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            # A loss curve in Braille must not end a run whose terminal speaks Latin-1.
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()

    def step(self, step: int, total: int | None, loss: float, tokens_per_s: float, phase: str) -> None:
        """One optimizer step is done; `total` is None until the run knows its length."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=phase,
                completed=step,
                total=total,
                loss=f"{loss:.3f}",
                speed=f"{tokens_per_s:,.0f}",
            )
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        if now - self._said_at < _LINE_EVERY_S and step != total:
            return
        self._said_at = now
        done, seconds = step - self._first[0], now - self._first[1]
        left = f"  {format_seconds((total - step) * seconds / done)} left" if total and done else ""
        self.say(f"{phase}  step {step}/{total or '?'}  loss {loss:.3f}  {tokens_per_s:,.0f} tok/s{left}")


def format_seconds(seconds: float) -> str:
    """75 -> 1:15"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
