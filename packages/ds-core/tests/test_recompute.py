"""Checkpointed blocks have the gradients they would have, and keep of their inputs what they should."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from ds_core import PartitionedInputs, Topology, checkpoint_blocks
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm

WIDTH, DEPTH = 7, 4


class Block(nn.Module):
    """With dropout, so that a second run must see the random state of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Dropout(0.3)
        self.runs = 0

    def forward(self, x: Tensor, mask: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
        self.runs += 1
        inner = self.drop(self.down(torch.tanh(self.up(x))))
        return x + gain * (inner if mask is None else inner * mask)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        mask = torch.arange(WIDTH) % 2
        for block in self.blocks:
            x = block(x, mask, gain=0.5)
        return self.head(x)  # type: ignore[no-any-return]

    def runs(self) -> list[int]:
        return [int(block.runs) for block in self.blocks]  # type: ignore[arg-type]


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def backward(model: nn.Module, seed: int = 3) -> None:
    torch.manual_seed(seed)
    model(torch.randn(3, 5)).square().mean().backward()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_grads() -> dict[str, Tensor]:
    model = build()
    backward(model)
    return grads(model)


@pytest.mark.parametrize(
    ("which", "runs"),
    [
        (None, [2, 2, 2, 2]),
        (2, [2, 1, 2, 1]),
        (r"blocks\.[03]$", [2, 1, 1, 2]),
        (lambda name, module: name.endswith("1"), [1, 2, 1, 1]),
    ],
)
def test_chosen_blocks_run_twice_and_nothing_else_changes(which: Any, runs: list[int]) -> None:
    model = build()
    recompute = checkpoint_blocks(model, which)
    backward(model)
    assert model.runs() == runs
    assert_close_norm(grads(model), plain_grads(), 0.0)
    with torch.no_grad():
        model(torch.randn(3, 5))
    assert model.runs() == [run + 1 for run in runs]
    recompute.remove()
    backward(model)
    assert model.runs() == [run + 2 for run in runs]


def test_inputs_in_host_memory_are_the_same_inputs() -> None:
    model = build()
    checkpoint_blocks(model, keep=partial(save_on_cpu, pin_memory=False))
    backward(model)
    assert_close_norm(grads(model), plain_grads(), 0.0)


@distributed(world_size=2)
def test_each_rank_of_a_tensor_group_keeps_half_of_each_input(rank: int) -> None:
    """21 elements go into two parts of 11; integers (the mask) stay whole."""
    mesh = Topology(dp_shard=1, tp=2).build()
    keep = PartitionedInputs(mesh.communicator("tp", "recompute"), slots=DEPTH)
    expected = plain_grads()
    model = build()
    checkpoint_blocks(model, keep=keep)
    inputs: list[weakref.ref[Tensor]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    for step in range(3):
        inputs.clear()
        mesh.log.clear()
        torch.manual_seed(3)
        loss = model(torch.randn(3, 5)).square().mean()
        assert [ref() for ref in inputs[1:]] == [None] * (DEPTH - 1)  # nobody keeps them whole
        assert keep.live_bytes == DEPTH * 11 * 4
        loss.backward()
        assert keep.live_bytes == 0
        assert mesh.log.calls["tp", "all_gather"] == DEPTH
        assert_close_norm(grads(model), expected, 0.0)
        model.zero_grad()
        assert keep.allocated_bytes == DEPTH * 11 * 4, step  # the same chunk every step
    first = model(torch.randn(3, 5))
    second = model(torch.randn(3, 5))  # two graphs at once take a second chunk
    assert keep.allocated_bytes == keep.live_bytes == 2 * DEPTH * 11 * 4
    del first, second
    assert keep.live_bytes == 0


def test_one_rank_keeps_inputs_as_they_are() -> None:
    model = build()
    keep = PartitionedInputs(Topology().build().communicator("tp", "recompute"))
    checkpoint_blocks(model, keep=keep)
    backward(model)
    assert keep.allocated_bytes == 0
    assert_close_norm(grads(model), plain_grads(), 0.0)
    with pytest.raises(ValueError, match="at least 1 slot"):
        PartitionedInputs(Topology().build().communicator("tp"), slots=0)
