"""Chrome traces in which our phases and units have names: gather, reduce, forward, backward, step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from ds_core.observe.phases import Phases
from ds_core.train.engine import Engine

_IN_FLIGHT = ("gloo:", "nccl:", "xccl:", "hccl:")


class trace:
    """Writes what runs inside to a file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    With an engine, or a model and its optimizer, there are ranges "forward", "backward", "step", "forward
    blocks.0", "gather <unit>", "reduce <unit>" and "wait gather <unit>"; a plain loop says `with
    tracing.range("backward"):` itself. Options are torch.profiler.profile's: record_shapes, profile_memory,
    with_stack. On several ranks each writes its own file: step-rank0.json. Outside it costs nothing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: Engine | nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **options: Any,
    ) -> None:
        self.path = _for_this_rank(Path(path))
        self._target, self._optimizer = target, optimizer
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, **options)
        self._phases: Phases | None = None

    def __enter__(self) -> trace:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._target is not None:
            self._phases = Phases(
                self._target, self, optimizer=self._optimizer, own_backward=False, per_unit=True
            )
        self._profiler.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._phases is not None:
            self._phases.detach()
            self._phases = None
        self._profiler.stop()
        partial = self.path.with_name(f".{self.path.stem}.partial.json")
        self._profiler.export_chrome_trace(str(partial))
        found = json.loads(partial.read_text("utf-8", errors="replace"))
        found["traceEvents"] = list(_untangle(found["traceEvents"]))
        partial.write_text(json.dumps(found), "utf-8")
        partial.replace(self.path)

    def range(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A range of your own."""
        return record_function(name)

    # -- what Phases tells ---------------------------------------------------------------------------------

    def begin(self, phase: str, of: str) -> Any:
        """A range opens."""
        begun = record_function(f"{phase} {of}".strip())
        begun.__enter__()  # type: ignore[no-untyped-call]
        return begun

    def end(self, begun: Any) -> None:
        """The range closes."""
        begun.__exit__(None, None, None)

    def stepped(self) -> None:
        """The weights were updated."""
        self._profiler.step()


def _untangle(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """torch's ranges of messages in flight ("gloo:recv") end later than what they began in: a track for each.

    Viewers need the ranges of one thread to lie inside one another, and draw asynchronous events beside them.
    """
    for number, event in enumerate(events):
        if event.get("ph") != "X" or not str(event.get("name")).startswith(_IN_FLIGHT):
            yield event
            continue
        same = {key: event[key] for key in ("name", "pid", "tid")} | {"cat": "in flight", "id": number}
        yield same | {"ph": "b", "ts": event["ts"], "args": event.get("args", {})}
        yield same | {"ph": "e", "ts": event["ts"] + event["dur"]}


def _for_this_rank(path: Path) -> Path:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return path
    return path.with_name(f"{path.stem}-rank{dist.get_rank()}{path.suffix or '.json'}")
