"""`ds report` says what is here, in text and JSON, and survives a package whose part of it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ds_core.cli.doctor import _settings
from ds_core.cli.main import main


class Row(NamedTuple):
    op: str
    runs: str


def rows() -> list[Row]:
    return [Row("ds::adam", "native"), Row("ds::a_longer_name", "reference")]


def fail() -> list[Row]:
    raise RuntimeError("no compiler")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that adds two sections, by its installed metadata alone."""
    info = tmp_path / "ds_kernels-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ds-kernels\nVersion: 9.8.7\n")
    module = "ds_report_plugin"
    (tmp_path / f"{module}.py").write_text(Path(__file__).read_text())
    (info / "entry_points.txt").write_text(f"[ds.report]\nkernels = {module}:rows\nother = {module}:fail\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_report_as_text(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    for wanted in (torch.__version__, "  backends", "gloo", "usable of", "  ds-kernels  9.8.7\n"):
        assert wanted in out
    table = "kernels\n  op                 runs\n  ds::adam           native\n  ds::a_longer_name  reference"
    assert table in out
    assert "RuntimeError: no compiler" in out


def test_the_report_as_json(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["packages"]["ds-kernels"] == "9.8.7"
    assert found["kernels"][0] == {"op": "ds::adam", "runs": "native"}
    assert found["other"] == [{"failed": "RuntimeError: no compiler"}]


def test_secrets_are_not_shown() -> None:
    env = {"DS_TOKEN": "x", "NCCL_DEBUG": "INFO", "CUDA_API_KEY": "y", "HOME": "/", "OMP_NUM_THREADS": "2"}
    shown = {"CUDA_API_KEY": "(set, not shown)", "DS_TOKEN": "(set, not shown)"}
    assert _settings(env) == shown | {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"}
