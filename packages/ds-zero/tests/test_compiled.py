"""Blocks are chosen in four ways, and have their own forward back afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ds_core.state.forwards import ForwardSwap, choose_blocks
from ds_zero import Zero, compile_blocks


def test_blocks_are_chosen_by_number_pattern_and_function() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
            self.head = nn.Linear(2, 2)

    def chosen(which: Any) -> list[str]:
        model = Plus()
        swap = ForwardSwap("compile").put(choose_blocks(model, which).values(), lambda forward: forward)
        found = [name for name, module in model.named_modules() if "forward" in vars(module)]
        swap.remove()
        swap.remove()
        assert not any("forward" in vars(module) for module in model.modules())
        return found

    assert chosen(None) == [f"layers.{i}" for i in range(5)]
    assert chosen(2) == ["layers.0", "layers.2", "layers.4"]
    assert chosen(r"layers\.[13]|head") == ["layers.1", "layers.3", "head"]
    assert chosen(lambda name, module: name.endswith("4")) == ["layers.4"]
    for nothing in ("absent", lambda name, module: False):
        with pytest.raises(ValueError, match=r"chooses no module; the model's blocks are layers\.0"):
            chosen(nothing)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chosen(0)
    with pytest.raises(ValueError, match="repeats nothing"):
        choose_blocks(nn.Linear(2, 2))


def test_compiling_chosen_blocks_can_be_taken_back() -> None:
    """What compiling does, at every stage, is in integration-tests/parity/test_compile.py."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = compile_blocks(model, 2)
    assert ["forward" in vars(block) for block in model] == [True, False]
    assert Zero(stage=1).shard(model).features == {"fp32", "compile"}
    compiled.remove()
    assert not any("forward" in vars(block) for block in model)
