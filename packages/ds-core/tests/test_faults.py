"""Planted faults show: a missing wait, an input reused too early, a lost bucket, a late and a dead rank."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.ground.ticket import Ticket
from ds_core.testing.distributed import RankFailure, distributed, run_ranks
from ds_core.testing.faults import DroppingCommunicator, SlowCommunicator, kill_this_rank, slow_module


class Plain:
    """The default group's collectives, started at once."""

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def all_gather(self, out: Tensor, shard: Tensor) -> Ticket:
        parts = list(out.chunk(self.world))
        return Ticket([dist.all_gather(parts, shard, async_op=True)])

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False
    ) -> Ticket:
        total = full.clone()

        def finish() -> None:
            part = total.chunk(self.world)[self.rank] * scale
            out.copy_(out + part if accumulate else part)

        return Ticket([dist.all_reduce(total, async_op=True)], finish=finish)

    def all_reduce(self, tensor: Tensor, *, op: str = "sum") -> Ticket:
        return Ticket([dist.all_reduce(tensor, async_op=True)])

    def all_to_all(self, out: Tensor, src: Tensor) -> Ticket:
        return Ticket([dist.all_to_all_single(out, src, async_op=True)])

    def broadcast(self, tensor: Tensor, *, root: int = 0) -> Ticket:
        return Ticket([dist.broadcast(tensor, root, async_op=True)])


@distributed(world_size=2)
def test_a_slow_collective_shows_a_missing_wait(rank: int) -> None:
    comm = SlowCommunicator(Plain(), ms=5)
    assert (comm.rank, comm.world) == (rank, 2)
    first, second = torch.zeros(2), torch.ones(1)
    gathered = comm.all_gather(first, torch.tensor([rank + 1.0]))
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
    comm = SlowCommunicator(Plain())
    src, out = torch.ones(2), torch.zeros(2)
    ticket = comm.all_to_all(out, src)
    src.fill_(7.0)
    ticket.wait()
    assert out.tolist() == [7.0, 7.0]


@distributed(world_size=2)
def test_a_dropped_bucket_is_lost_on_every_rank(rank: int) -> None:
    comm = DroppingCommunicator(Plain(), index=1)
    seen = []
    for accumulate in (False, False, False):
        out = torch.full((1,), 5.0)
        comm.reduce_scatter(out, torch.ones(2), accumulate=accumulate, scale=0.5).wait()
        seen.append(out.item())
    assert seen == [1.0, 0.0, 1.0]
    kept = torch.full((1,), 5.0)
    DroppingCommunicator(Plain(), index=0).reduce_scatter(kept, torch.ones(2), accumulate=True).wait()
    assert kept.item() == 5.0
    whole = torch.full((1,), float(rank))
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
