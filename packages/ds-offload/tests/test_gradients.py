"""Gradients that leave, are added to, and are written by others in between."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from overlap_cases import Run


@pytest.mark.parametrize("tier", ["host", "nvme", "0.5 host / 0.5 nvme"])
@pytest.mark.parametrize("between", ["nothing", "written", "replaced", "kept", "dropped"])
def test_what_is_added_is_what_is_there(between: str, tier: str, tmp_path: Path) -> None:
    """The old gradient starts to come back when room is asked for; what happens until it is kept counts."""
    run = Run("adamw", nvme=str(tmp_path), grads=tier)
    store, unit = run.store, run.owner.trainable[0]
    assert store is not None

    def kept(value: float) -> Any:
        room = store.room(unit)
        assert room is not None
        return room.fill_(value)

    store.keep(unit, kept(1.0), final=False)
    store.landed()
    room = kept(10.0)
    gradient = unit.gradient
    assert gradient is not None
    wanted = 11.0
    if between == "written":
        gradient.fill_(2.0)
        wanted = 12.0
    elif between == "replaced":
        unit.gradient = torch.full_like(gradient, 3.0)
        wanted = 13.0
    elif between == "kept":
        store.keep(unit, torch.full_like(gradient, 100.0), final=False)
        wanted = 111.0
    elif between == "dropped":
        unit.drop_grad()
        wanted = 10.0
    store.keep(unit, room, final=False)
    store.landed()
    assert unit.gradient is not None
    assert torch.equal(unit.gradient, torch.full_like(unit.gradient, wanted))
    assert store.norm_of(unit) == torch.full_like(unit.gradient, wanted).norm()
