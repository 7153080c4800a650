"""What is left behind: a dropped model frees its memory and its process groups, an exit is quiet."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_core import leave_distributed
from ds_core.testing.distributed import distributed
from ds_core.train.clip import clip_grad_norm_
from ds_zero import full_tensor, shard

_TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not _TASKS.exists(), reason="counts threads through /proc")


def threads() -> Counter[str]:
    return Counter((task / "comm").read_text().strip() for task in _TASKS.iterdir())


def one_step(stage: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shard(model, optimizer, stage=stage)
    model(torch.ones(4, 64)).sum().backward()
    clip_grad_norm_(optimizer, 1.0)  # the handle was dropped: the optimizer keeps it
    optimizer.step()
    optimizer.zero_grad()
    full_tensor(next(model.parameters()))
    return model, optimizer


@distributed(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_dropped_model_is_freed(stage: int) -> None:
    model, optimizer = one_step(stage)
    dead = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


@needs_proc
@distributed(2)
def test_leaving_ends_the_threads_of_every_group() -> None:
    model, optimizer = one_step(3)
    assert any("gloo" in name for name in threads())
    leave_distributed()
    assert not dist.is_initialized()
    assert not [name for name in threads() if "gloo" in name]
    with pytest.raises(RuntimeError, match=r"closed by leave_distributed\(\): build a new mesh"):
        model(torch.ones(4, 64))
    del optimizer


_SCRIPT = """
import atexit, pathlib, sys, torch
def gloo():
    names = [(t / "comm").read_text() for t in pathlib.Path("/proc/self/task").iterdir()]
    print("gloo threads", sum("gloo" in name for name in names), flush=True)
atexit.register(gloo)  # runs after ours, which registers later
from torch import nn
from ds_zero import shard
kept = nn.Linear(64, 64)
opt = torch.optim.SGD(kept.parameters(), lr=0.1)
shard(kept, opt, stage=3)
kept(torch.ones(4, 64)).sum().backward()
opt.step()
gloo()
"""


@needs_proc
def test_a_script_that_ends_with_a_live_model_has_closed_its_groups(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    run = [sys.executable, "-m", "ds_core.cli.main", "launch", "--nproc", "2", "script.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = [line for line in done.stdout.splitlines() if line.startswith("gloo threads")]
    assert int(before.split()[-1]) > 0
    assert int(after.split()[-1]) == 0


class Probe:
    """Something to hold on to."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
        self.blocks[1].weight.requires_grad_(False)
        self.blocks[2].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_a_step_leaves_no_graph_behind(stage: int) -> None:
    model = Wide()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    shard(model, optimizer, stage=stage)
    seen: list[weakref.ref[Probe]] = []

    def look(module: nn.Module, args: object, output: torch.Tensor) -> None:
        assert output.grad_fn is not None
        probe = output.grad_fn.metadata["probe"] = Probe()  # lives as long as the node does
        seen.append(weakref.ref(probe))

    for block in model.blocks:
        block.register_forward_hook(look)
    for _ in range(2):
        model(torch.ones(4, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    assert len(seen) == 8
    assert [ref() for ref in seen] == [None] * 8
