"""A rank that dies in the middle of training: the others stop soon, and the launcher says which it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os
import sys

import torch
from ds_core.testing.faults import kill_this_rank
from ds_core.testing.models import CASES
from ds_zero import shard

case, rank = CASES["mlp"], int(os.environ["RANK"])
model = case.build()
model, optimizer = shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=int(sys.argv[1]))
for step in range(1000):
    loss = case.losses(model, case.rank_batch(step, rank, 3))[0]
    kill_this_rank(rank == 1 and step == 4)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_rank_that_dies_stops_the_job_and_is_named(tmp_path: Path, stage: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "ds_core.cli.main",
        "launch",
        "--nproc",
        "3",
        "--logs",
        str(tmp_path / "logs"),
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(script), stage], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    took = time.monotonic() - began
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "rank 1" in said.splitlines()[-1] or "rank 1" in "\n".join(said.splitlines()[-6:]), said
    assert "SIGKILL" in said, said
    assert took < 90, f"{took:.0f} s"
