"""The convergence benchmark at small scale: 1-bit Adam learns as AdamW does, and sends a fifth."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "packages" / "ds-comm" / "benchmarks" / "convergence.py"


@pytest.mark.slow
def test_onebit_adam_learns_as_adamw_does(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves"
    main = runpy.run_path(str(PROGRAM))["main"]
    settings = ["--steps", "100", "--seeds", "0", "--batch", "4", "--contenders", "adamw,onebit-adam"]
    rows = {row["contender"]: row for row in main([*settings, "--out", str(out)])}
    assert rows["onebit-adam"]["worse_by"] < 0.01
    assert rows["onebit-adam"]["loss"] != rows["adamw"]["loss"]
    assert rows["onebit-adam"]["times_less"] > 5
    runs = json.loads(out.with_suffix(".json").read_text())["runs"]
    first, *_, last = runs["onebit-adam"][0]["curve"]
    assert last[0] == 100
    assert last[1] < first[1] - 0.3  # it learned something
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
