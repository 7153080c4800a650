"""Every Python block of every guide page runs, on one process and on two."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCKS = {
    f"{page.stem}-{number}": code
    for page in sorted(GUIDES.glob("*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
}
NEEDS = ("transformers", "peft")  # a block that imports one of these is for people who have it


def test_every_page_but_the_list_has_a_block() -> None:
    silent = [page.stem for page in GUIDES.glob("*.md") if not any(b.startswith(page.stem) for b in BLOCKS)]
    assert silent == ["index"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_runs(tmp_path: Path, name: str, ranks: int) -> None:
    for package in NEEDS:
        if re.search(rf"^(import|from) {package}\b", BLOCKS[name], re.MULTILINE):
            pytest.importorskip(package, reason=f"the block is for people who have {package}")
    (tmp_path / "block.py").write_text(BLOCKS[name], encoding="utf-8")
    start = [] if ranks == 1 else ["-m", "ds_core.cli.main", "launch", "--nproc", str(ranks)]
    done = subprocess.run(
        [sys.executable, *start, "block.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
