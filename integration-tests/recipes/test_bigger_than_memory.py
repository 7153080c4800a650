"""`python -m ds_offload.recipes.bigger_than_memory`: the story holds at a small size, and 350M in 1.5 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [sys.executable, "-m", "ds_offload.recipes.bigger_than_memory"]


def run(folder: Path, *flags: str, limit: int = 280) -> subprocess.CompletedProcess[str]:
    command = [*RUN, "--disk", str(folder), "--out", str(folder / "run"), *flags]
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit, env=env)


def report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run" / "report.json").read_text())


def test_a_small_model_from_disk_and_what_is_written(tmp_path: Path) -> None:
    done = run(tmp_path, "--size", "2m", "--seq", "64", "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    found = report(tmp_path)
    assert found["twin_equal"] is True
    assert found["peak_resident_bytes"] <= found["budget_bytes"]
    assert len(found["steps"]) == 3
    assert (tmp_path / "run" / "bytes.png").stat().st_size > 10_000
    assert "update U0" in (tmp_path / "run" / "plan.txt").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], "a file of state was left behind"


def test_a_budget_that_is_too_small_is_refused_or_reported(tmp_path: Path) -> None:
    refused = run(tmp_path, "--size", "2m", "--seq", "64", "--memory", "0.1")
    assert refused.returncode != 0
    assert "need" in refused.stderr
    assert "there are 100.0 MB" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_350_million_parameters_train_in_one_and_a_half_gigabytes(tmp_path: Path) -> None:
    """The planner refuses them without a disk; with 5.6 GB of state on one, the peak is counted."""
    done = run(tmp_path, "--size", "350m", "--seq", "64", "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Without offload the planner refuses" in done.stdout
    found = report(tmp_path)
    assert found["parameters"] == 349_953_024
    assert found["peak_resident_bytes"] < 1.5e9
