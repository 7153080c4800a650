"""Every Python block of every guide page runs, on one process and on two."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_core.ground.mesh import leave_distributed
from ds_core.testing.distributed import run_ranks

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCKS = {
    f"{page.stem}-{number}": code
    for page in sorted(GUIDES.glob("*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
}
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NEEDS = ("transformers", "peft")  # a block that imports one of these is for people who have it


def test_every_page_but_the_list_has_a_block() -> None:
    silent = [page.stem for page in GUIDES.glob("*.md") if not any(b.startswith(page.stem) for b in BLOCKS)]
    assert silent == ["index"]


FIRST = next(iter(BLOCKS))


def play(folder: Path, port: int) -> None:
    """Run a script as the main one, in the environment that the launcher gives; of one rank, without any."""
    alone = dist.get_world_size() == 1
    leave_distributed()  # the script joins its job itself
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in ENVIRONMENT if alone else ():
        os.environ.pop(name, None)
    os.chdir(folder)
    sys.argv = ["block.py"]
    runpy.run_path("block.py", run_name="__main__")


def written(name: str, folder: Path) -> Path:
    """The folder, with the block in it as a script."""
    for package in NEEDS:
        if re.search(rf"^(import|from) {package}\b", BLOCKS[name], re.MULTILINE):
            pytest.importorskip(package, reason=f"the block is for people who have {package}")
    (folder / "block.py").write_text(BLOCKS[name], encoding="utf-8")
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_runs(tmp_path: Path, name: str, ranks: int) -> None:
    """Started by fork, where torch is there already."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    run_ranks(play, ranks, timeout=120.0, folder=written(name, tmp_path), port=port)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_block_runs_from_the_command_line(tmp_path: Path, ranks: int) -> None:
    folder = written(FIRST, tmp_path)
    start = [] if ranks == 1 else ["-m", "ds_core.cli.main", "launch", "--nproc", str(ranks)]
    done = subprocess.run(
        [sys.executable, *start, "block.py"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
