"""What whole runs send on the papers' schedules, counted on the wire, beside fp32 Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_comm import OnebitAdam, OnebitLamb, ZeroOneAdam, ZeroOneSchedule
from ds_core import ReplicatedOwner, ShardedOptimizer
from ds_core.testing.distributed import run_ranks

NUMEL, STEPS, FREEZE = 1 << 15, 40, 6  # a warm-up of 15 %
AS_SIGNS = 32 / (1 + 32 / 2048)  # 31.5 times less: a bit, and a scale of 4 bytes for 2048 of them
SCHEDULE = ZeroOneSchedule(20, var_update_scaler=1, local_step_scaler=6, local_step_clipper=16)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, NUMEL))

    def forward(self, x: float) -> torch.Tensor:
        return (self.weight * x).square().mean()


def build(kind: str, params: Any) -> Any:
    if kind == "zero one":
        return ZeroOneAdam(params, lr=1e-4, schedule=SCHEDULE)
    cls: Any = {"adam": OnebitAdam, "lamb": OnebitLamb}.get(kind)
    return torch.optim.AdamW(params, lr=1e-4) if cls is None else cls(params, lr=1e-4, freeze_step=FREEZE)


def count(rank: int, kind: str) -> list[int]:
    """Bytes of every step, but for what ranks agree on."""
    model = Wide()
    optimizer = build(kind, model.parameters())
    owner = ReplicatedOwner(model, reduce=getattr(optimizer, "route", None))
    ShardedOptimizer(optimizer, owner)
    found = []
    for step in range(STEPS):
        owner.mesh.log.clear()
        model(1.0 + rank + 0.1 * step).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent = owner.mesh.log.sent_bytes.values()
        found.append(sum(one for one in sent if one >= NUMEL // 16))
    return found


@pytest.mark.parametrize("kind", ["adam", "lamb"])
def test_a_warm_up_of_15_percent_sends_a_fifth_of_what_adam_sends(kind: str) -> None:
    steps = run_ranks(count, 2, kind=kind)[0]
    # Votes share the counter of an all-reduce: 4 bytes for each of a dozen flags.
    whole = run_ranks(count, 2, kind="fp32")[0]
    assert whole[5] == pytest.approx(4 * NUMEL, rel=1e-3)
    assert steps[FREEZE:] == [NUMEL // 8 + 4 * NUMEL // 2048] * (STEPS - FREEZE)
    assert whole[-1] / steps[-1] == pytest.approx(AS_SIGNS, rel=1e-3)
    assert whole[-1] / steps[-1] > 26
    ratio = sum(whole) / sum(steps)
    assert ratio == pytest.approx(STEPS / (FREEZE + (STEPS - FREEZE) / AS_SIGNS), rel=1e-2)
    assert ratio > 5


def test_zero_one_adam_sends_less_than_that() -> None:
    """Refreshes at steps 1, 2, 4, 8 and 16; from step 20 on ever more steps send nothing."""
    steps = run_ranks(count, 2, kind="zero one")[0]
    kinds = "".join("p" if sent > 2 * NUMEL else "s" if sent else "." for sent in steps)
    assert [at + 1 for at, kind in enumerate(kinds) if kind == "p"] == [1, 2, 4, 8, 16]
    assert kinds[20:] == "ssssss" + ".s.s.s" + "...s...."
    onebit = FREEZE + (STEPS - FREEZE) / AS_SIGNS
    mine = kinds.count("p") + kinds.count("s") / AS_SIGNS
    assert sum(steps) == pytest.approx(4 * NUMEL * mine, rel=1e-2)
    assert mine < onebit
    assert sum(1 for kind in kinds if kind != ".") < STEPS
