"""Gradients that leave, are added to, and are written by others in between."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from overlap_cases import Run


@pytest.mark.parametrize("tier", ["host", "nvme", "0.5 host / 0.5 nvme"])
@pytest.mark.parametrize(
    ("between", "there"), [("nothing", 1.0), ("written", 2.0), ("replaced", 3.0), ("dropped", None)]
)
def test_what_is_added_to_is_what_is_there(
    between: str, there: float | None, tier: str, tmp_path: Path
) -> None:
    """Room comes with what the unit has so far, whoever put it there; what is kept is all of it."""
    run = Run("adamw", nvme=str(tmp_path), grads=tier)
    store, unit = run.store, run.owner.trainable[0]
    assert store is not None
    first = store.room(unit)
    assert first is not None
    store.keep(unit, first.fill_(1.0), final=False)  # not landed yet
    assert unit.gradient is not None
    if between == "written":
        store.landed()
        unit.gradient.fill_(2.0)
    elif between == "replaced":
        unit.gradient = torch.full_like(unit.gradient, 3.0)
    elif between == "dropped":
        unit.drop_grad()
    room = store.room(unit)
    assert room is not None
    assert there is None or torch.equal(room, torch.full_like(room, there))
    store.keep(unit, room.fill_(5.0), final=False)
    store.landed()
    assert unit.gradient is not None
    assert torch.equal(unit.gradient, torch.full_like(unit.gradient, 5.0))
    noted = store.norm_of(unit)
    assert noted == torch.full_like(unit.gradient, 5.0).norm()
    assert store.norm_of(unit) is noted
    unit.gradient.fill_(7.0)
    assert store.norm_of(unit) == torch.full_like(unit.gradient, 7.0).norm()
