"""The README's plain loop, word for word, in an environment that has ds-zero and what it declares."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script() -> str:
    """The first Python block of the README that calls `shard`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "shard(" in block)


WAYS = {
    "python": ["python", "train.py"],
    "torch.distributed.run": ["python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"],
    "ds launch": ["ds", "launch", "--nproc", "2", "train.py"],
}


@pytest.mark.parametrize("way", WAYS)
def test_plain_loop_trains(environment: Callable[[str], Path], tmp_path: Path, way: str):
    (tmp_path / "train.py").write_text(script())
    program, *args = WAYS[way]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": env.get("GLOO_SOCKET_IFNAME", "lo")}
    command = [str(environment("ds-zero") / "bin" / program), *args]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 5, done.stdout  # one process of the run speaks
    assert losses[-1] < losses[0] / 2


def test_plain_loop_is_short():
    lines = [line for line in script().splitlines() if line.strip()]
    assert len(lines) <= 22, "the README promises that a plain loop stays a plain loop"
