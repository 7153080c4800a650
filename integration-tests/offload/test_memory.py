"""With all state on disk a step needs the memory of its plan and of the units in use, whatever the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PENDING = 8 << 20  # bytes of writes that may wait for the disk

SCRIPT = """
import gc, json, sys
import torch
from torch import nn
from ds_offload import TieredStore
from ds_zero import Zero
from ds_core import ShardedOptimizer

folder, layers, dtype, PENDING = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
WIDTH = 1024


def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024


def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")


torch.set_num_threads(1)
store = TieredStore(
    nvme=folder, params="nvme", grads="nvme", masters="nvme", moments="nvme", chunk_numel=1 << 18,
    pending_bytes=PENDING,
)
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def fill(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.03)
        nn.init.zeros_(module.bias)


name = None if dtype == "fp32" else "bfloat16"
owner = Zero(
    stage=3, dtype=name, bucket_numel=1, initializer=fill, prefetch_numel=WIDTH * WIDTH + WIDTH, keep_numel=1
).shard(model, store=store)
sharded = ShardedOptimizer(optimizer, owner)
x = torch.randn(4, WIDTH).to(torch.float32 if name is None else torch.bfloat16)


def step():
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


step()  # moments are made
store.settle()
gc.collect()
before = status("VmRSS")
reset_peak()
for _ in range(2):
    step()
grown = status("VmHWM") - before
unit = owner.units[0]
print(json.dumps({
    "grown": grown, "plan": sharded.elsewhere.plan.peak_bytes, "tiers": store.bytes_by_tier(),
    "unit": unit.layout.numel * (unit.dtype.itemsize + unit.grad_dtype.itemsize),
}))
"""


def measure(folder: Path, layers: int, dtype: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(layers), dtype, str(PENDING)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak through /proc")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_grows_by_its_plan_and_the_units_in_use(dtype: str, tmp_path: Path) -> None:
    """Whole copies and gradients of the unit that runs and those beside it; nothing of the other layers."""
    found = {layers: measure(tmp_path, layers, dtype) for layers in (8, 24)}
    for layers, row in found.items():
        grown, plan, unit = (int(str(row[name])) for name in ("grown", "plan", "unit"))
        tiers = row["tiers"]
        assert isinstance(tiers, dict)
        assert tiers["device"] == tiers["host"] == 0
        assert tiers["nvme"] > layers * (1 << 20) * 12
        # In use at once: this unit, the one ahead and the one before; of each a copy in either dtype. A disk
        # that is busy besides leaves as many bytes on their way to it as it may.
        assert grown < plan + PENDING + 4 * unit, f"{layers} layers: {row}"
    assert int(str(found[24]["grown"])) < int(str(found[8]["grown"])) + (16 << 20), found
