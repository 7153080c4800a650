"""Metrics reach every sink on rank 0 and none elsewhere, and a broken sink costs one warning."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_core.observe.metrics import (
    CsvSink,
    Event,
    JsonlSink,
    MetricsLog,
    TensorBoardSink,
    WandbSink,
    read_jsonl,
)
from ds_core.testing.distributed import distributed


class Broken:
    """Fails from its second event on, and when closed."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        if self.events:
            raise OSError("disk full")
        self.events.append(event)

    def close(self) -> None:
        raise RuntimeError("still broken")


def test_jsonl_keeps_every_value_and_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog([JsonlSink(path)]) as log:
        log.log(1, {"train/loss": torch.tensor(2.5)}, lr=np.float32(0.5), note="a\nb", skipped=True)
        log.log(2, a=math.nan, b=math.inf, c=-math.inf, d=None)
        assert len(path.read_text().splitlines()) == 2  # flushed while open
    path.write_text(path.read_text() + '{"step": 3, "los')  # killed while writing
    with MetricsLog([{"type": "jsonl", "path": str(path)}]) as log:
        log.log(4, loss=1)
    for line in path.read_text().splitlines()[:2]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second, last = read_jsonl(path)
    assert {k: v for k, v in first.items() if k != "time"} == {
        "step": 1,
        "train/loss": 2.5,
        "lr": 0.5,
        "note": "a\nb",
        "skipped": True,
    }
    assert math.isnan(second["a"])
    assert (second["b"], second["c"], second["d"]) == (math.inf, -math.inf, None)
    assert (last["step"], last["loss"]) == (4, 1)


def test_csv_takes_metrics_that_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for steps in ((1, 2), (3,)):
        with MetricsLog([CsvSink(path)]) as log:
            for step in steps:
                log.log(step, **{"loss": step / 2, f"only, {step}": 'x"y'})
    with path.open(newline="") as file:
        rows = [(r["step"], r["name"], r["value"]) for r in csv.DictReader(file)]
    wanted = [(str(s), n, v) for s in (1, 2, 3) for n, v in (("loss", str(s / 2)), (f"only, {s}", 'x"y'))]
    assert rows == wanted


def test_a_broken_sink_is_left_out_after_one_warning(tmp_path: Path) -> None:
    broken, path = Broken(), tmp_path / "m.jsonl"
    log = MetricsLog([broken, JsonlSink(path), JsonlSink("/proc/nowhere/m.jsonl")])
    with pytest.warns(UserWarning, match="JsonlSink failed and gets nothing more, training goes on"):
        log.log(1, x=1)
    with pytest.warns(UserWarning, match="^metrics: Broken") as caught:
        log.log(2, x=2)
    assert [str(w.message).split(":")[1].split()[0] for w in caught] == ["Broken", "Broken"]
    assert "disk full" in str(caught[0].message)
    log.log(3, x=3)
    log.close()
    log.log(4, x=4)
    assert [e["x"] for e in read_jsonl(path)] == [1, 2, 3]
    assert len(broken.events) == 1


@distributed(world_size=2)
def test_ranks_above_0_write_nothing(rank: int, tmp_path: Path) -> None:
    with MetricsLog([JsonlSink(tmp_path / f"{rank}.jsonl")]) as log:
        log.log(1, loss=rank)
    assert (tmp_path / f"{rank}.jsonl").exists() == (rank == 0)


def test_without_a_process_group_the_environment_tells_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with MetricsLog([JsonlSink(tmp_path / "m.jsonl")]) as log:
        log.log(1, loss=1)
    assert not list(tmp_path.iterdir())


def test_what_is_no_metric_is_refused_by_name() -> None:
    for rank in (0, 1):
        with pytest.raises(TypeError, match="metric 'x' is a Tensor; allowed: numbers"):
            MetricsLog([], rank=rank).log(1, x=torch.ones(2))
        with pytest.raises(TypeError, match="metric 'y' is a list"):
            MetricsLog([], rank=rank).log(1, y=[1])


def test_an_unknown_sink_names_the_known_ones() -> None:
    with pytest.raises(LookupError, match=r"no sink .*csv, jsonl"):
        MetricsLog([{"type": "json"}], rank=1)


def test_an_optional_sink_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("ds_core.observe.metrics.find_spec", lambda name: None)
    for kind, options in (("wandb", {"project": "p"}), ("tensorboard", {"folder": "x"})):
        with pytest.raises(LookupError, match=rf'pip install "ds-core\[{kind}\]"'):
            MetricsLog([{"type": kind, **options}])


def test_wandb_gets_values_under_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the service: a module of the same name that writes down its calls."""
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "def init(**options):\n    calls.append(('init', options))\n    return Run()\n"
        "class Run:\n"
        "    def log(self, values, step):\n        calls.append((step, values))\n"
        "    def finish(self):\n        calls.append('finish')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with MetricsLog([WandbSink("p", mode="offline")]) as log:
        log.log(7, loss=1.5)
    calls = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    assert calls == [("init", {"project": "p", "mode": "offline"}), (7, {"loss": 1.5}), "finish"]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    with MetricsLog([TensorBoardSink(tmp_path)]) as log:
        for step in range(3):
            log.log(step, {"train/loss": step / 2}, note="left out")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(os.fspath(tmp_path)).Reload()
    assert read.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
