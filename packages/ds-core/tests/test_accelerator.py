"""The device, and what a process does with freed host memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ds_core.ground.accelerator import Accelerator, keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import torch
from ds_core.ground.accelerator import Accelerator, keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(Accelerator(torch.device("cpu")))
def churn():
    for _ in range(20):
        torch.ones(10_000_000)  # more than the 32 MB up to which glibc learns to keep blocks by itself
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's malloc")
def test_kept_memory_is_not_cleared_again() -> None:
    """40 MB come and go 20 times: some 200,000 page faults by default, next to none when kept."""
    faults = {}
    for how in ("default", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True, timeout=60
        )
        faults[how] = int(done.stdout)
    # Some kernels take idle pages back by themselves, so a few come again even when they are kept.
    assert faults["keep"] < faults["default"] / 4


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(Accelerator(torch.device("cpu")))
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert not keep_freed_memory(Accelerator(torch.device("meta")))


def test_memory_figures_are_plausible() -> None:
    accelerator = Accelerator(torch.device("cpu"))
    assert 0 < accelerator.free_bytes() <= accelerator.total_bytes()
    assert accelerator.comm_backend == "gloo"


def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert Accelerator.current().is_cpu
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        with pytest.raises(ValueError, match="torch sees no such device"):
            Accelerator.current()
