"""Every Python block of the package's README runs, on one process and on two."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ds_core.testing.distributed import run_ranks

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(script: Path) -> None:
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_block_runs(tmp_path: Path, number: int, ranks: int) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number], encoding="utf-8")
    run_ranks(run, ranks, script=script)
