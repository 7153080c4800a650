"""Planted faults show: a missing wait, an input reused too early, a lost bucket, a late and a dead rank."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.collectives import TorchCommunicator
from ds_core.testing.distributed import RankFailure, distributed, run_ranks
from ds_core.testing.faults import DroppingCommunicator, SlowCommunicator, kill_this_rank, slow_module


def plain() -> TorchCommunicator:
    """The default group's collectives, started at once."""
    return TorchCommunicator(dist.group.WORLD, Accelerator.current().device)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, device=Accelerator.current().device)


@distributed(world_size=2)
def test_a_slow_collective_shows_a_missing_wait(rank: int) -> None:
    comm = SlowCommunicator(plain(), ms=5)
    assert (comm.rank, comm.world) == (rank, 2)
    first, second = tensor(0.0, 0.0), tensor(1.0)
    gathered = comm.all_gather(first, tensor(rank + 1.0))
    summed = comm.all_reduce(second)
    assert first.tolist() == [0.0, 0.0]
    assert second.item() == 1.0
    summed.wait()  # also runs what was issued before it
    assert (first.tolist(), second.item()) == ([1.0, 2.0], 2.0)
    gathered.wait()
    gathered.wait()
    assert first.tolist() == [1.0, 2.0]


@distributed(world_size=2)
def test_a_slow_collective_shows_an_input_reused_too_early() -> None:
    comm = SlowCommunicator(plain())
    src, out = tensor(1.0, 1.0), tensor(0.0, 0.0)
    ticket = comm.all_to_all(out, src)
    src.fill_(7.0)
    ticket.wait()
    assert out.tolist() == [7.0, 7.0]


@distributed(world_size=2)
def test_a_dropped_bucket_is_lost_on_every_rank(rank: int) -> None:
    comm = DroppingCommunicator(plain(), index=1)
    seen = []
    for _ in range(3):
        out = tensor(5.0)
        comm.reduce_scatter(out, tensor(1.0, 1.0), scale=0.5).wait()
        seen.append(out.item())
    assert seen == [1.0, 0.0, 1.0]
    kept = tensor(5.0)
    DroppingCommunicator(plain(), index=0).reduce_scatter(kept, tensor(1.0, 1.0), accumulate=True).wait()
    assert kept.item() == 5.0
    whole = tensor(float(rank))
    comm.broadcast(whole, root=1).wait()
    assert whole.item() == 1.0


def test_a_slow_module_is_late_and_then_not() -> None:
    module, x = nn.Linear(2, 2), torch.ones(2)
    with slow_module(module, ms=30):
        start = time.perf_counter()
        module(x)
        assert time.perf_counter() - start >= 0.03
    assert not module._forward_pre_hooks


def die_in_step_two(rank: int) -> None:
    for step in range(4):
        kill_this_rank(rank == 1 and step == 2)
        dist.barrier()


def test_a_killed_rank_is_seen() -> None:
    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(die_in_step_two, 2)
