"""Parking at every stage, with and without a store, on several ranks; and what it gives the system back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import Engine
from ds_core.ground.mesh import Topology
from ds_core.state.parked import ParkedStateError
from ds_core.testing.distributed import distributed
from ds_core.testing.faults import SlowCommunicator
from ds_core.train.optim import attached
from ds_offload import TieredStore, park, unpark
from ds_offload.parking import StateLot
from ds_zero import Zero, full_tensor, shard

KINDS = ("params", "grads", "masters", "moments")


def build(stage: int, dtype: torch.dtype | None, store: TieredStore | None) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Sequential(nn.Linear(40, 40), nn.GELU()), nn.Linear(40, 24))
    model[1][0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    shard(model, optimizer, stage=stage, dtype=dtype, store=store)
    sharded = attached(optimizer)
    return Engine(model, sharded.owner, sharded, accumulate=2)


def micro(engine: Engine, seed: int, rank: int) -> None:
    dtype = engine.owner.precision.param or torch.float32
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(100 * rank + seed)).to(dtype)
    engine.backward(engine(x).float().square().mean())
    engine.step()


def state(engine: Engine) -> list[Tensor]:
    found = [unit.values().detach().clone() for unit in engine.owner.units]
    found += [unit.local.detach().clone() for unit in engine.owner.units]
    for values in engine.optimizer.optimizer.state.values():
        found += [value.clone() for value in values.values() if isinstance(value, Tensor)]
    return found


def held(engine: Engine) -> int:
    return sum(parcel.nbytes for parcel in StateLot(engine.owner)._find())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tiers", ["none", "nvme", "half"])
@distributed(world_size=2)
def test_training_goes_on_bit_for_bit(
    rank: int, stage: int, dtype: torch.dtype | None, tiers: str, tmp_path: Path
) -> None:
    def store() -> TieredStore | None:
        if tiers == "none":
            return None
        if tiers == "nvme":
            low = {"params": "nvme"} if stage == 3 else {}
            return TieredStore(nvme=str(tmp_path), masters="nvme", moments="nvme", grads="nvme", **low)
        half = "0.5 device / 0.5 host"
        return TieredStore(masters=half, moments=half, grads="host")

    plain, parked = build(stage, dtype, None), build(stage, dtype, store())
    for seed in range(5):
        for engine in (plain, parked):
            micro(engine, seed, rank)
        to = f"nvme:{tmp_path}" if seed % 2 else "host"
        before = held(parked)
        if seed == 3:  # one by one, and back in another order
            left = sum(parked.offload_states(kind, to=to) for kind in KINDS)
            back = sum(parked.reload_states(kind) for kind in ("moments", "grads", "params", "masters"))
        else:
            left = parked.offload_states(to=to)
            assert held(parked) == 0
            with pytest.raises(ParkedStateError, match="reload_states"):
                parked(torch.ones(1, 24, dtype=dtype))
            with pytest.raises(ParkedStateError, match="reload_states"):
                full_tensor(parked.model[0].weight)
            with pytest.raises(ParkedStateError, match="reload_states"):
                parked.model[0].weight.sum()
            back = parked.reload_states()
        assert left == back == before == held(parked)
        assert all(map(torch.equal, state(plain), state(parked)))
    assert torch.equal(full_tensor(plain.model[0].weight), full_tensor(parked.model[0].weight))


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_nothing_is_under_way_when_it_parks(rank: int, stage: int) -> None:
    """Collectives start as late as they may: one that was not waited for would write to freed memory."""
    plain, parked = build(stage, torch.bfloat16, None), build(stage, torch.bfloat16, None)
    owner: Any = parked.owner
    owner.reducer._wire._comm = SlowCommunicator(owner.reducer._wire._comm)
    owner.gatherer._comm = SlowCommunicator(owner.gatherer._comm)
    for seed in range(4):
        for engine in (plain, parked):
            micro(engine, seed, rank)
        parked.offload_states()
        if seed == 2:
            for engine in (plain, parked):
                engine.zero_grad()
        parked.reload_states()
    for engine in (plain, parked):
        micro(engine, 4, rank)
    assert all(map(torch.equal, state(plain), state(parked)))


@distributed(world_size=4)
def test_second_shards_leave_too(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    owner = Zero(stage=3, secondary_shard=True).shard(model, mesh)
    before = model(torch.ones(2, 24))
    second = sum(tensor.nbytes for tensor in owner.copies())
    shards = sum(unit.local.nbytes for unit in owner.units)
    owner.let_whole_go()
    assert second > 0
    assert park(model) == second + shards
    unpark(model)
    assert torch.equal(model(torch.ones(2, 24)), before)


_MEASURED = """
import gc, json, sys
import torch
from torch import nn
from ds_core import Engine
from ds_core.train.optim import attached
from ds_zero import shard

stage, folder = int(sys.argv[1]), sys.argv[2]

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def build(width):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shard(model, optimizer, stage=stage, dtype=torch.bfloat16)
    sharded = attached(optimizer)
    return Engine(model, sharded.owner, sharded, accumulate=2)

def micro(engine, width):
    engine.backward(engine(torch.ones(2, width, dtype=torch.bfloat16)).float().mean())
    engine.step()

warm = build(32)  # threads, libraries and pools that any training brings
for _ in range(4):
    micro(warm, 32)
warm.offload_states(to=f"nvme:{folder}")
warm.reload_states()
base = resident()
engine = build(1024)
for _ in range(3):
    micro(engine, 1024)
full = resident()
left = engine.offload_states(to=f"nvme:{folder}")
parked = resident()
engine.reload_states()
micro(engine, 1024)
print(json.dumps({"base": base, "full": full, "parked": parked, "left": left}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_is_back_within_five_percent_of_the_baseline(stage: int, tmp_path: Path) -> None:
    """100 MB of state. The baseline is the same process before the model, with everything warm."""
    command = [sys.executable, "-c", _MEASURED, str(stage), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert found["left"] > 80e6
    assert found["full"] - found["base"] > 0.9 * found["left"]
    assert found["parked"] < 1.05 * found["base"], found
