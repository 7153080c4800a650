"""Ranks that do different things: every rank raises one message that says who is where."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ds_core.ground.desync import DesyncError
from ds_core.ground.mesh import Topology, leave_distributed
from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.owner import owner_of
from ds_core.testing.distributed import run_ranks
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero

LIMIT_S = 20.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor, skip: int = -1) -> Tensor:
        x = self.first(x).relu()
        for index, block in enumerate(self.blocks):
            if index != skip:
                x = block(x).relu()
        return self.last(x)


def build(stage: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    mesh = Topology().build(timeout_s=LIMIT_S)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Small units: each block is one.
    owner = Zero(stage=stage, bucket_numel=1, prefetch_numel=0, keep_numel=0).shard(model, mesh)
    ShardedOptimizer(optimizer, owner)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int = -1) -> None:
    for _ in range(steps):
        model(torch.randn(2, 16), skip).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_on_rank_0(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    if rank == 0:
        CheckpointStore(folder).save(2, {"model": owner_of(model.last.weight)})
    train(model, optimizer, 2)


def state_dict_on_rank_0(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    if rank == 0:
        model.state_dict()
    train(model, optimizer, 2)


def uneven_batches(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 3 + rank)


def different_branch(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    train(model, optimizer, 2, skip=1 if rank else -1)


def one_raises(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    if rank == 1:
        raise KeyError("a bad row in the data")
    train(model, optimizer, 2)


def different_lengths(rank: int, folder: str) -> None:
    model, _ = build()
    mesh = Topology().build(timeout_s=LIMIT_S)
    mesh.barrier()
    with torch.no_grad():
        for _ in range(4 + 3 * rank):
            model(torch.randn(1, 16))
    mesh.barrier()


def different_order(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 1)
    with torch.no_grad():
        first, second = (model.blocks[0], model.blocks[1]) if rank else (model.blocks[1], model.blocks[0])
        second(first(torch.randn(1, 16)))
    train(model, optimizer, 1)


def different_shape(rank: int, folder: str) -> None:
    comm = Topology().build(timeout_s=LIMIT_S).communicator("dp_shard", "reduce")
    full = torch.ones(64 if rank else 32)
    comm.reduce_scatter(torch.empty(full.numel() // 2), full, about="grown").wait()


def one_is_killed(rank: int, folder: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, optimizer, 2)


def play(rank: int, scene: str, folder: str) -> str:
    """A scene on one rank; what DesyncError said, with the seconds until then."""
    began = time.monotonic()
    act: Callable[[int, str], None] = globals()[scene]
    try:
        act(rank, folder)
    except DesyncError as error:
        text = f"{time.monotonic() - began:.1f}\n{error}"
        Path(folder, f"said-{rank}").write_text(text)
        time.sleep(1.0)  # the others shall not learn it from this process's end
        leave_distributed()
        return text
    return ""


# scene -> what the message must say, and the ranks that must say it
SCENES = {
    "save_on_rank_0": (
        ["rank 0 waits", "saving step 2", "in save_on_rank_0", "rank 1 waits", "in train"],
        [0, 1],
    ),
    "state_dict_on_rank_0": (["parted at", "in state_dict_on_rank_0", "in train"], [0, 1]),
    "uneven_batches": (
        ["rank 0 has left", "rank 1 waits", "first.weight", "in train"],
        [1],
    ),
    "different_branch": (["parted at", "blocks.1", "blocks.2", "in train"], [0, 1]),
    "one_raises": (["rank 1 has left", "KeyError", "a bad row", "rank 0 waits"], [0]),
    "different_lengths": (["a barrier", "in different_lengths", "first.weight"], [0, 1]),
    "different_order": (["parted at", "blocks.0", "blocks.1", "in different_order"], [0, 1]),
    "different_shape": (["parted at", "32 x float32", "64 x float32", "grown"], [0, 1]),
    "one_is_killed": (["rank 1 is gone", "does not answer", "rank 0 waits", "in train"], [0]),
}


ALONE = ("uneven_batches", "one_raises", "one_is_killed")  # a rank's end is part of the scene


@pytest.mark.parametrize("scene", SCENES)
def test_every_rank_says_what_happened(scene: str, tmp_path: Path) -> None:
    wanted, speakers = SCENES[scene]
    if scene in ALONE:
        play_in_processes(scene, tmp_path)
    else:
        run_ranks(play, 2, timeout=90.0, scene=scene, folder=str(tmp_path))
    said = [(tmp_path / f"said-{rank}").read_text() for rank in speakers]
    for text in said:
        seconds, _, message = text.partition("\n")
        print(f"{scene}: {seconds} s\n{message}\n")
        assert float(seconds) <= LIMIT_S
        assert [part for part in wanted if part not in message] == [], message
    assert len({text.partition("\n")[2] for text in said}) == 1


def play_in_processes(scene: str, folder: Path) -> None:
    """Two plain processes, without a launcher that would end one for the other."""
    environ = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, __file__, scene, str(folder)]
    ranks = [
        subprocess.Popen(command, env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for process in ranks:
        process.wait(timeout=90)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    play(int(os.environ["RANK"]), sys.argv[1], sys.argv[2])
