"""A DeepSpeed file trains bit for bit as without its offloading, and as the objects that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_core
from ds_core.testing.distributed import distributed
from ds_offload import Tiered, TieredStore
from ds_zero import Zero, full_tensor

WIDTH = 48
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.05,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}


def build() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, WIDTH))


def batch(seed: int, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * seed + rank)).to(dtype)


def run(engine: Any, rank: int, steps: int = 3) -> list[Tensor]:
    dtype = engine.owner.precision.param or torch.float32
    for seed in range(2 * steps):
        engine.backward(engine(batch(seed, rank, dtype)).float().square().mean())
        engine.step()
    norms = torch.tensor([engine.report.grad_norm, engine.report.loss])
    return [norms, *(full_tensor(param, master=True).clone() for param in engine.model.parameters())]


def from_file(zero: dict[str, Any], rank: int, **more: Any) -> Any:
    engine, *_ = ds_core.initialize(model=build(), config={**BASE, **more, "zero_optimization": zero})
    return engine


def tiers(folder: Path) -> dict[str, dict[str, Any]]:
    nvme = {"device": "nvme", "nvme_path": str(folder)}
    return {
        "cpu": {"offload_optimizer": {"device": "cpu"}},
        "legacy": {"cpu_offload": True},
        "nvme": {"offload_optimizer": {**nvme, "pipeline_read": True, "buffer_count": 8}},
        "ratio": {"offload_optimizer": {"device": "cpu", "ratio": 0.4}},
        "tiles": {"offload_optimizer": nvme, "sub_group_size": 4096},
        "params": {"offload_optimizer": nvme, "offload_param": {**nvme, "max_in_cpu": 0}},
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_a_file_trains_bit_for_bit(rank: int, stage: int, dtype: str, tmp_path: Path) -> None:
    more = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    want = run(from_file({"stage": stage}, rank, **more), rank)
    for name, section in tiers(tmp_path).items():
        if name == "params" and stage < 3:
            continue
        got = run(from_file({"stage": stage, **section}, rank, **more), rank)
        assert all(map(torch.equal, want, got)), name


@distributed(world_size=2)
def test_the_objects_are_the_same(rank: int, tmp_path: Path) -> None:
    section = {
        "stage": 3,
        "sub_group_size": 5000,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "ratio": 0.75},
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path), "max_in_cpu": 1000},
    }
    aio = {"block_size": 65536, "queue_depth": 16}
    engine = from_file(section, rank, bf16={"enabled": True}, aio=aio)
    shard_numel = -(-sum(param.numel() for param in build().parameters()) // 2)
    store = engine.owner.store
    assert isinstance(store, TieredStore)
    quarter = "0.25 device / 0.75 nvme"
    policy = Tiered(
        nvme=str(tmp_path),
        params=f"{1000 / shard_numel:.9g} host / {1 - 1000 / shard_numel:.9g} nvme",
        masters=quarter,
        moments=quarter,
        grads=quarter,
        chunk_numel=5000,
        block_bytes=65536,
        queue_depth=16,
    )
    assert store.policy == policy
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    owner = Zero(stage=3, dtype="bfloat16", bucket_numel=1_000_000).shard(model, store=TieredStore(policy))
    by_hand = ds_core.Engine(
        model, owner, ds_core.ShardedOptimizer(optimizer, owner), max_norm=0.05, accumulate=2
    )
    assert all(map(torch.equal, run(engine, rank), run(by_hand, rank)))
    assert store.bytes_by_tier() == owner.store.bytes_by_tier()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_ratio_acts_on_a_small_model(ratio: float) -> None:
    """11 thousand parameters. (The reference's ratio cuts between tiles of 1e9, so here it does nothing.)"""
    zero = {"stage": 3, "reduce_bucket_size": 2000, "offload_optimizer": {"device": "cpu", "ratio": ratio}}
    engine = from_file(zero, 0, bf16={"enabled": True})
    run(engine, 0)
    held = engine.owner.store.bytes_by_tier()
    away = held["host"] / (held["host"] + sum(_here(engine)))
    largest = max(unit.layout.shard_numel for unit in engine.owner.units)
    assert abs(away - ratio) <= 0.5 * largest / sum(u.layout.shard_numel for u in engine.owner.units) + 0.01


def _here(engine: Any) -> list[int]:
    """Bytes of masters and moments that are updated on the device."""
    pieces = [p for p in engine.optimizer.pieces if not engine.optimizer.elsewhere.has(p.unit)]
    states = [engine.optimizer.optimizer.state[piece.param] for piece in pieces]
    moments = [v.nbytes for state in states for v in state.values() if isinstance(v, Tensor) and v.dim()]
    return [piece.param.nbytes for piece in pieces] + moments


def test_state_is_parked_under_deepspeeds_names(tmp_path: Path) -> None:
    plain = from_file({"stage": 2}, 0, bf16={"enabled": True})
    engine = from_file({"stage": 2}, 0, bf16={"enabled": True})
    numel = sum(unit.layout.numel for unit in engine.owner.units)
    run(plain, 0)
    run(engine, 0)
    assert engine.offload_states(include={"optim_states"}, pin_memory=False) == 8 * numel
    assert engine.offload_states(include=["hp_params"], device=f"nvme:{tmp_path}") == 4 * numel
    assert engine.offload_states(include=["lp_params", "lp_grads", "contiguous_grad_buffer"]) == 2 * numel
    with pytest.raises(RuntimeError, match="call reload_states"):
        engine(batch(0, 0, torch.bfloat16))
    assert engine.reload_states(non_blocking=True) == 14 * numel
    assert engine.offload_states() == 14 * numel
    engine.reload_states()
    assert engine.offload_states(include=[]) == 0
    engine.empty_partition_cache()
    with pytest.raises(ValueError, match="include='weights'; allowed: optim_states, hp_params"):
        engine.offload_states(include=["weights"])
    assert all(map(torch.equal, run(plain, 0), run(engine, 0)))


def test_super_offload_is_exact() -> None:
    want = run(from_file({"stage": 3}, 0), 0)
    section = {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    engine = from_file(section, 0)
    assert engine.owner.store.policy.update == "speculative"
    assert all(map(torch.equal, want, run(engine, 0)))


def test_zenflow_takes_its_section() -> None:
    zenflow = {"topk_ratio": 0.25, "select_interval": 2, "update_interval": 2, "overlap_step": False}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": zenflow}
    policy = from_file(zero, 0).owner.store.policy.zenflow
    assert (policy.topk_ratio, policy.select_interval, policy.update_interval) == (0.25, 2, 2)
