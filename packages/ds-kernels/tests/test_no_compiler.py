"""Where no compiler is, every op runs on its reference, after one warning for each family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EVERYTHING = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import torch
from ds_kernels.conformance.compare import samples
from ds_kernels.registry import FAMILIES, load, registry
from ds_kernels.table import report
cpu = torch.device("cpu")
for family in FAMILIES:
    rows = load(family, cpu)
    assert all(row.implementation in ("reference", "torch") for row in rows), rows
    for kernel in registry().of(family):
        sample = list(samples(kernel, cpu))[-1]
        getattr(torch.ops.ds, kernel.name).default(*sample.args, **sample.kwargs)
        print("ran", kernel.name)
assert not any(row.used for row in report() if row.implementation == "native")
assert [row.implementation for row in report() if row.op == "aio" and row.used] == ["python"]
print("families without a library:", sum(any(k.native for k in registry().of(f)) for f in FAMILIES))
"""


def test_everything_runs_on_references(tmp_path: Path) -> None:
    path = os.pathsep.join(
        [str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    )
    # Nothing but Python itself on PATH, and a cache in which nobody has built before.
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "TRITON_INTERPRET")}
    env = {**clean, "PATH": str(tmp_path), "PYTHONPATH": path, "DS_KERNELS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert lines[-1] == f"families without a library: {len(warnings)}"
    assert warnings
    assert all("no C++ compiler found: looked for g++, c++ and clang++ on PATH" in line for line in warnings)
    assert sum(line.startswith("ran ") for line in lines) >= len(warnings)
