"""DeepSpeed files that name 1-bit optimizers drive the same objects, at every stage that they serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_comm import LambCoefficients, OnebitAdam, OnebitLamb, ZeroOneAdam, ZeroOneSchedule
from ds_core.setup.compat import initialize
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES

CASE = CASES["mlp"]
PARAMS: dict[str, dict[str, Any]] = {
    "OneBitAdam": {
        "freeze_step": 2, "betas": [0.8, 0.99], "weight_decay": 0.01, "eps": 1e-6,
        "cuda_aware": False, "comm_backend_name": "nccl", "bias_correction": True,
    },
    "OneBitLamb": {
        "freeze_step": 2, "max_coeff": 0.3, "min_coeff": 0.02, "coeff_beta": 0.8, "factor_max": 3.0,
        "factor_min": 0.6, "factor_threshold": 0.2, "comm_backend_name": "mpi",
    },
    "ZeroOneAdam": {
        "var_freeze_step": 3, "var_update_scaler": 2, "local_step_scaler": 1, "local_step_clipper": 1,
    },
}  # fmt: skip


def config(kind: str, stage: int, bf16: bool = False, **params: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": kind, "params": {"lr": 1e-2, **PARAMS[kind], **params}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }


def runs(rank: int, world: int, kind: str, stage: int, bf16: bool) -> list[int]:
    model = CASE.build()
    engine, optimizer, *_ = initialize(model=model, config=config(kind, stage, bf16))
    assert optimizer.route.owner is engine.owner
    assert optimizer.param_groups[0]["lr"] == 1e-2
    if kind == "OneBitAdam":
        assert isinstance(optimizer, OnebitAdam)
        group = optimizer.param_groups[0]
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.99), 0.01, 1e-6)
    elif kind == "OneBitLamb":
        assert isinstance(optimizer, OnebitLamb)
        assert optimizer.coefficients == LambCoefficients(0.3, 0.02, 0.8, 3.0, 0.6, 0.2)
    else:
        assert isinstance(optimizer, ZeroOneAdam)
        assert optimizer.schedule == ZeroOneSchedule(3, 2, 1, 1)
    sent = []
    for micro in range(12):
        engine.backward(CASE.losses(model, CASE.rank_batch(micro, rank, world))[0])
        engine.step()
        if engine.report is not None and micro % 2:
            sent.append(sum(engine.report.bytes_on_wire.values()))
    assert engine.global_steps == 6
    engine.owner.settle()
    for param in model.parameters():
        theirs = [torch.empty_like(param) for _ in range(world)]
        dist.all_gather(theirs, param.detach().contiguous())
        assert torch.equal(*theirs)
    return sent


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize("kind", list(PARAMS))
def test_a_deepspeed_file_drives_them(kind: str, stage: int, bf16: bool) -> None:
    for sent in run_ranks(runs, 2, kind=kind, stage=stage, bf16=bf16):
        assert sent[-1] < sent[1]  # the last step sends signs, the second one gradients


def refused(world: int) -> None:
    for kind, changes, more, wanted in (
        ("OneBitAdam", {"freze_step": 3}, {}, "freze_step"),
        ("OneBitAdam", {"amsgrad": True}, {}, "amsgrad"),
        ("OneBitAdam", {"comm_backend_name": "smoke"}, {}, "comm_backend_name"),
        ("ZeroOneAdam", {"local_step_clipper": 4}, {}, "local_step_clipper=1"),
        ("OneBitAdam", {}, {"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "is fp16"),
        ("OneBitLamb", {}, {"zero_optimization": {"stage": 3}}, "use stage 0, 1 or 2"),
    ):
        with pytest.raises(ValueError, match=wanted):
            initialize(model=CASE.build(), config={**config(kind, 1, **changes), **more})


def test_what_a_file_asks_for_in_vain_is_refused() -> None:
    run_ranks(refused, 2)
