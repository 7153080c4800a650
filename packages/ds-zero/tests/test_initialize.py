"""A DeepSpeed file at stages 1 to 3: parity with plain torch, schedules, resuming elsewhere, exporting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_core
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.train.lr import WarmupLR
from ds_zero import full_tensor

# As DeepSpeed's own tutorials write it.
TUTORIAL: dict[str, Any] = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
        "reduce_bucket_size": 50000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
}
FP16 = {"fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "min_loss_scale": 1}}
BF16 = {"bf16": {"enabled": True}}


def tiny() -> nn.Module:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 8)) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(8, 3))


def rows(step: int, micro: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the global batch of `step`, so that they do not depend on how it is shared out."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 3, generator=generator)
    first = (micro * world() + rank) * size
    return x[first : first + size], y[first : first + size]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train(engine: Any, steps: int, first: int = 0, dtype: torch.dtype = torch.float32) -> list[float]:
    rates = []
    for step in range(first, first + steps):
        rates.append(engine.get_lr()[0])
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = rows(step, micro, engine.global_rank, engine.train_micro_batch_size_per_gpu())
            engine.backward(F.mse_loss(engine(x.to(dtype)).float(), y))
            engine.step()
    return rates


def weights(engine: Any) -> dict[str, Tensor]:
    return {name: full_tensor(p).float() for name, p in engine.module.named_parameters()}


def plain(steps: int, batch: int) -> tuple[dict[str, Tensor], list[float], float]:
    """Weights, the rate of each step, and the last gradient's norm."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    schedule = WarmupLR(optimizer, 0, 0.01, 4)
    rates, norm = [], 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 3, generator=generator)
        F.mse_loss(model(x[:batch]), y[:batch]).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: p.detach() for name, p in model.named_parameters()}, rates, norm


def config(stage: int, accumulate: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": 16,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
        "gradient_clipping": 0.3,
        "zero_optimization": zero,
        **more,
    }


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_every_stage_equals_plain_torch_and_its_schedule(stage: int, accumulate: int) -> None:
    engine, *_ = ds_core.initialize(model=tiny(), config=config(stage, accumulate))
    want, rates, norm = plain(6, 16)
    assert train(engine, 6) == pytest.approx(rates, rel=1e-12)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)  # Adam would hide a factor
    mine = weights(engine)
    for name, other in want.items():
        assert (mine[name] - other).norm() <= 1e-5 * other.norm(), name
    if stage == 3:
        assert len(engine.owner.units) == 4  # reduce_bucket_size bounds what is put together


@pytest.mark.parametrize("precision", [FP16, BF16, {}], ids=["fp16", "bf16", "fp32"])
@distributed(world_size=2)
def test_a_tutorial_file_trains_unchanged(precision: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / f"ds_config{dist.get_rank()}.json"
    file.write_text(json.dumps({**TUTORIAL, **precision}))
    engine, optimizer, _, scheduler = ds_core.initialize(model=tiny(), config=str(file))
    dtype = next(engine.parameters()).dtype
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in masters]
    train(engine, 4, dtype=dtype)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (16, 8)
    assert engine.get_lr() == scheduler.get_last_lr()
    assert scheduler.last_batch_iteration == 3
    assert {p.dtype for p in masters} == {torch.float32}
    assert all(not torch.equal(old, new) for old, new in zip(before, masters, strict=True))
    assert type(optimizer).__name__ == "AdamW"  # DeepSpeed's Adam decouples unless adam_w_mode is false


@pytest.mark.parametrize(("stage", "other"), [(1, 3), (3, 2), (2, 0), (0, 3)])
def test_resume_at_another_world_size_and_stage(stage: int, other: int, tmp_path: Path) -> None:
    run_ranks(save_on_two_ranks, 2, stage=stage, folder=tmp_path)
    want = read(tmp_path / "whole.safetensors")
    engine, *_ = ds_core.initialize(model=tiny(), config=config(other, 4))
    path, state = engine.load_checkpoint(tmp_path / "run")
    assert (Path(str(path)).name, state) == ("global_step3", {"stage": stage})
    assert engine.global_steps == 3
    for name, mine in weights(engine).items():
        assert torch.equal(mine, want[name]), name
    train(engine, 3, 3)
    final, _, _ = plain(6, 16)
    for name, mine in weights(engine).items():
        assert (mine - final[name]).norm() <= 1e-5 * final[name].norm(), name


def save_on_two_ranks(stage: int, folder: Path) -> None:
    engine, *_ = ds_core.initialize(model=tiny(), config=config(stage, 2))
    train(engine, 3)
    engine.save_checkpoint(folder / "run", client_state={"stage": stage})
    assert engine.save_16bit_model(folder, "whole.safetensors")


def read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found


@distributed(world_size=2)
def test_stage_three_leaves_nothing_whole(tmp_path: Path) -> None:
    engine, *_ = ds_core.initialize(model=tiny(), config=config(3, 1, **BF16))
    train(engine, 1, dtype=torch.bfloat16)
    assert engine.save_16bit_model(tmp_path)
    if dist.get_rank() == 0:
        found = read(tmp_path / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert found.keys() == tiny().state_dict().keys()


class RowScaled(torch.optim.SGD):
    """Looks at whole rows, and does not claim otherwise."""


@distributed(world_size=2)
def test_an_optimizer_that_needs_whole_matrices_gets_them() -> None:
    model = tiny()
    optimizer = RowScaled(model.parameters(), lr=0.1)
    file = {"train_batch_size": 16, "zero_optimization": {"stage": 2}}
    engine, *_ = ds_core.initialize(model=model, optimizer=optimizer, config=file)
    assert engine.owner.cut == "whole"
    train(engine, 1)


@pytest.mark.parametrize("stage", [0, 1, 3])
@distributed(world_size=2)
def test_modules_that_a_file_names_stay_fp32(stage: int) -> None:
    config = {
        "train_batch_size": 2,
        "bf16": {"enabled": True},
        "data_types": {"keep_in_fp32_modules": ["1.0", "3"]},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    }
    model = tiny()
    ds_core.initialize(model=model, config=config)
    kept = {name for name, param in model.named_parameters() if param.dtype == torch.float32}
    assert kept == {"1.0.weight", "1.0.bias", "3.weight", "3.bias"}
