"""Every Python block of the package's README runs, on one process and on two."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_block_runs(tmp_path: Path, number: int, ranks: int) -> None:
    (tmp_path / "block.py").write_text(BLOCKS[number], encoding="utf-8")
    start = [] if ranks == 1 else ["-m", "ds_core.cli.main", "launch", "--nproc", str(ranks)]
    done = subprocess.run(
        [sys.executable, *start, "block.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
