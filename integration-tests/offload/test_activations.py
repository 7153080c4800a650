"""Sharded training with activations on disk: the same bits at every stage; parameters stay where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_core import checkpoint_blocks
from ds_core.testing.distributed import run_ranks
from ds_offload import ActivationOffload, offload_activations, offload_blocks
from ds_offload.activation_shelf import Shelf
from ds_zero import full_tensor, shard

WIDTH, ROWS, DEPTH, STEPS = 32, 24, 4, 3
MODES = ("none", "whole", "blocks", "checkpoints")


class Block(nn.Module):
    """Its third weight is used through a view that autograd does not know as one: a detached one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        return torch.tanh(self.mix(x)) + x @ self.mix.weight.detach().t()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*[Block() for _ in range(DEPTH)]))


def train(stage: int, mode: str, folder: str) -> tuple[list[Tensor], int]:
    """The model's values after some steps, and the bytes that were saved."""
    model = build()
    model, optimizer = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), stage=stage)
    offload: ActivationOffload | None = None
    if mode != "none":
        offload = offload_activations(
            model, f"nvme:{folder}", min_bytes=1, ahead_bytes=4096, pending_bytes=4096
        )
    if mode == "checkpoints":
        checkpoint_blocks(model, keep=offload)
    if mode == "blocks":
        assert offload is not None
        offload_blocks(model, offload)
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(ROWS, WIDTH)
        if mode == "whole":
            assert offload is not None
            with offload:
                loss = model(x).square().mean()
        else:
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = 0
    if offload is not None:
        traffic = offload.traffic()
        assert traffic.live_bytes == 0
        assert traffic.fetched_bytes > 0
        saved = traffic.saved_bytes
    return [full_tensor(param) for param in model.parameters()], saved


def compare(stage: int, folder: str) -> dict[str, int]:
    wanted, _ = train(stage, "none", folder)
    found = {}
    for mode in MODES[1:]:
        got, found[mode] = train(stage, mode, folder)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), mode
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_and_the_same_bytes_at_every_stage(stage: int, tmp_path: Path) -> None:
    ranks = run_ranks(compare, 2, timeout=120.0, stage=stage, folder=str(tmp_path))
    assert ranks[0] == ranks[1]
    # of each block: x, up(x), gelu, x + down, mix's output; the weights are not among them
    tall, wide = ROWS * WIDTH * 4, ROWS * 2 * WIDTH * 4
    assert ranks[0]["blocks"] <= STEPS * DEPTH * (4 * tall + 2 * wide)
    assert ranks[0]["checkpoints"] == STEPS * DEPTH * tall
    assert ranks[0]["blocks"] < ranks[0]["whole"] <= ranks[0]["blocks"] + STEPS * 4 * tall


def poison(stage: int, folder: str) -> int:
    """How many pieces were put that lie in a parameter's memory."""
    model = build()
    model, _ = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), stage=stage)
    offload = offload_activations(model, f"nvme:{folder}", min_bytes=1, ahead_bytes=0)
    hits = []
    put = Shelf.put

    def look(self: Shelf, tensor: Tensor, piece: object) -> object:
        begin = tensor.untyped_storage().data_ptr()
        end = begin + tensor.untyped_storage().nbytes()
        with torch._C.DisableTorchFunctionSubclass():
            hits.extend(param for param in model.parameters() if begin <= param.data_ptr() < end)
        return put(self, tensor, piece)  # type: ignore[arg-type]

    Shelf.put = look  # type: ignore[method-assign, assignment]
    with offload:
        model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    return len(hits)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_piece_lies_in_a_parameters_memory(stage: int, tmp_path: Path) -> None:
    assert run_ranks(poison, 2, timeout=60.0, stage=stage, folder=str(tmp_path)) == [0, 0]
