"""A DeepSpeed file's `comms_logger` turns ds_comm's log on, and `log_summary` shows it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core import initialize
from ds_core.setup.config import ConfigError
from ds_core.testing.distributed import distributed
from ds_zero.compat import log_summary


def train(section: dict[str, Any] | None, stage: int = 2) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **({"comms_logger": section} if section is not None else {}),
    }
    engine, *_ = initialize(model=model, config=config)
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        loss = engine(torch.randn(4, 8)).square().mean()
        engine.backward(loss)
        engine.step()
    whole = [param.detach().clone() for param in model.parameters()] if stage < 3 else []
    return engine, whole


@distributed(2)
def test_the_section_logs_and_changes_nothing(rank: int, world: int) -> None:
    _, plain = train(None)
    engine, logged = train({"enabled": True})
    assert all(torch.equal(one, other) for one, other in zip(plain, logged, strict=True))
    rows = log_summary(engine, show_straggler=True, return_dict=True)
    assert rows["dp_shard/reduce_scatter"].calls >= 3
    assert rows["dp_shard/reduce_scatter"].world == 2
    assert rows["dp_shard/reduce_scatter"].straggler is not None
    assert rows["dp_shard/all_gather"].sent_bytes > 0
    steps = {row.step for row in engine.owner.mesh.log.listener.steps()}
    assert len(steps) >= 3  # the engine says where a step ends


@distributed(2)
def test_lines_for_the_ops_that_are_named(rank: int, world: int) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("ds_comm", "ds_zero"):
        logging.getLogger(name).addHandler(handler)
    section = {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["reduce_scatter_tensor"]}
    engine, _ = train(section)
    assert len(seen) >= 3
    assert all(f"rank {rank}: dp_shard of 2, reduce_scatter of" in line for line in seen)
    seen.clear()
    assert log_summary(engine) is None
    assert len(seen) == (1 if rank == 0 else 0)
    assert rank or "reduce_scatter" in seen[0]


@distributed(1)
def test_without_a_log_there_is_no_summary(rank: int, world: int) -> None:
    engine, _ = train(None)
    with pytest.raises(ValueError, match="no communication log is on"):
        log_summary(engine)


@distributed(1)
def test_a_section_that_would_log_nothing_or_names_no_op(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match="nothing would be logged"):
        train({"enabled": True, "prof_all": False})
    with pytest.raises(ConfigError, match="given 'all_sum'; allowed: all_gather"):
        train({"enabled": True, "prof_ops": ["all_sum"]})
