"""ds-comm with only what it declares: the bridges need no other package of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib.abc
import sys


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ds_zero", "ds_offload", "matplotlib"):
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, Absent())
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ds_comm import CommLog, Int8
from ds_comm.bridges.ddp import CodedHook, coded_hook
from ds_comm.bridges.fsdp2 import use_codecs
from ds_core.ground.mesh import Topology

mesh = Topology().build()
ddp = DistributedDataParallel(nn.Linear(4, 4))
ddp.register_comm_hook(CodedHook(ddp, Int8(), error_feedback=True, mesh=mesh), coded_hook)
ddp(torch.randn(2, 4)).sum().backward()
cut = nn.Linear(4, 4)
fully_shard(cut)
use_codecs(cut, gather=Int8(), reduce=Int8())
cut(torch.randn(2, 4)).sum().backward()
with CommLog(mesh) as log:
    pass
try:
    log.plot("log.png")
except ValueError as error:
    print(error)
print("done")
"""


def test_the_bridges_run_alone(tmp_path: Path) -> None:
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environ.pop("MASTER_ADDR", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the communication log has heard nothing yet: plot after a step",
        "done",
    ]


def test_importing_the_bridges_starts_nothing() -> None:
    code = (
        "import threading, ds_comm.bridges.ddp, ds_comm.bridges.fsdp2, ds_comm.log, torch.distributed as d;"
        "print(threading.active_count(), d.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "False"], done.stderr
