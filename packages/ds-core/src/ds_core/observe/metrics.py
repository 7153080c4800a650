"""One stream of training metrics, written to any number of sinks, none of which can stop the training."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch.distributed as dist

Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """What was measured at one step. `time` is in seconds since the epoch."""

    step: int
    time: float
    values: Mapping[str, Value]


class Sink(Protocol):
    """Where events go. Both calls come on rank 0 only; nothing is opened before the first event."""

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Hands every event to every sink on rank 0, and does nothing on the others.

    A sink that raises is closed and left out after one warning. Use as a context manager, or call `close`.
    """

    def __init__(self, sinks: Iterable[Sink | str | Mapping[str, Any]], *, rank: int | None = None) -> None:
        """Sinks are objects, or specs for entry point group `ds.sink`: {"type": "jsonl", "path": ...}."""
        built = [_build(sink) for sink in sinks]  # on every rank, so that a wrong spec fails on every rank
        self._sinks: list[Sink] = built if (_this_rank() if rank is None else rank) == 0 else []

    def log(self, step: int, named: Mapping[str, Any] | None = None, /, **values: Any) -> None:
        """Record values of one step, as keywords or, for names like "train/loss", as a mapping.

        Numbers, strings, booleans, None and one-element tensors; reading a tensor waits for its device.
        Raises: TypeError naming a value of another kind, on every rank.
        """
        values = {**(named or {}), **values}
        for name, value in values.items():
            if not (isinstance(value, float | int | str | None) or _is_scalar(value)):
                raise TypeError(
                    f"metric {name!r} is a {type(value).__name__}; allowed: numbers, str, bool, None"
                )
        if self._sinks:
            plain = {n: v.item() if _is_scalar(v) else v for n, v in values.items()}
            event = Event(int(step), time.time(), plain)
            self._sinks = [sink for sink in self._sinks if self._try(sink, event)]

    def close(self) -> None:
        """Finish all files; nothing is written afterwards."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._try(sink, None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _try(self, sink: Sink, event: Event | None) -> bool:
        """Write, or close without an event; False if that failed."""
        try:
            if event is None:
                sink.close()
            else:
                sink.write(event)
        except Exception as error:  # whatever a sink does, training goes on
            warnings.warn(
                f"metrics: {type(sink).__name__} failed and gets nothing more, training goes on: {error!r}",
                stacklevel=3,
            )
            if event is not None:
                _close_quietly(sink)
            return False
        return True


class JsonlSink:
    """One JSON object per line: step, time and the values. Appends, so a resumed run continues the file.

    NaN and infinities become the strings "NaN", "Infinity", "-Infinity", as JSON has no numbers for them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, event: Event) -> None:
        """Append the event and flush it."""
        values = {name: _jsonable(value) for name, value in event.values.items()}
        line = {"step": event.step, "time": round(event.time, 3), **values}
        self._file = self._file or _open_to_append(self.path)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class CsvSink:
    """A table with the columns step, time, name, value: one row per value, so metrics may come and go."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, event: Event) -> None:
        """Append one row per value and flush them."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        if self._file is None:
            self._file = _open_to_append(self.path)
            if self._file.tell() == 0:
                writer.writerow(["step", "time", "name", "value"])
        when = round(event.time, 3)
        writer.writerows([event.step, when, name, value] for name, value in event.values.items())
        self._file.write(rows.getvalue())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard; values that are not numbers are left out. Needs the extra `tensorboard`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        _need("tensorboard", "TensorBoardSink", "tensorboard")
        self.folder = Path(folder)
        self._writer: Any = None

    def write(self, event: Event) -> None:
        """Add one scalar per number."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        for name, value in event.values.items():
            if isinstance(value, float | int):
                self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """A Weights & Biases run; options are those of `wandb.init`. Needs the extra `wandb`."""

    def __init__(self, project: str, **options: Any) -> None:
        _need("wandb", "WandbSink", "wandb")
        self.options = {"project": project, **options}
        self._run: Any = None

    def write(self, event: Event) -> None:
        """Log the values under the event's step."""
        if self._run is None:
            import wandb

            self._run = wandb.init(**self.options)
        self._run.log(dict(event.values), step=event.step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a JsonlSink's file. A line that a killed run left half written is left out."""
    events = []
    for line in Path(path).read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
        events.append({k: words.get(v, v) if isinstance(v, str) else v for k, v in event.items()})
    return events


def _build(sink: Sink | str | Mapping[str, Any]) -> Sink:
    if isinstance(sink, str | Mapping):
        from ds_core.setup.plugins import resolve

        built: Sink = resolve("sink", sink)
        return built
    return sink


def _this_rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def _is_scalar(value: Any) -> bool:
    """A tensor or numpy value of one element."""
    return callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None and _one(value)


def _one(value: Any) -> bool:
    return value.numel() == 1 if hasattr(value, "numel") else bool(value.size == 1)


def _jsonable(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _open_to_append(path: Path) -> TextIO:
    """Open for appending, past a line that a killed run may have left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    if file.tell() > 0:
        with path.open("rb") as reader:
            reader.seek(-1, os.SEEK_END)
            if reader.read(1) != b"\n":
                file.write("\n")
    return file


def _need(module: str, sink: str, extra: str) -> None:
    if find_spec(module) is None:
        raise LookupError(f'{sink} needs {module}, which is not installed: pip install "ds-core[{extra}]"')


def _close_quietly(sink: Sink) -> None:
    """Give back what a failed sink holds; that it failed has been said."""
    try:
        sink.close()
    except Exception as error:
        warnings.warn(f"metrics: {type(sink).__name__} did not close either: {error!r}", stacklevel=2)
