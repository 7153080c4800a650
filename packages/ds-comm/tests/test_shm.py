"""Through shared memory: the bits of the plain routes, whatever sizes, order of waits and delays."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.collectives import TorchCommunicator, sum_chunks
from ds_core.ground.mesh import Mesh, Topology
from ds_core.testing.distributed import distributed
from ds_core.testing.faults import SlowCommunicator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 5, 31, 1000, 33_001, 300_001)  # the last two: several pieces, above what ranks sum together


def mesh(shm: bool = True) -> Mesh:
    os.environ["DS_SHM"] = str(int(shm))
    return Topology().build(Accelerator(torch.device("cpu")), timeout_s=60)


def wire(shm: bool = True, channel: str = "reduce", over: Mesh | None = None) -> TorchCommunicator:
    comm = (over or mesh(shm)).communicator("dp_shard", channel)
    assert isinstance(comm, TorchCommunicator)
    assert comm.route == ("shared memory" if shm else "gloo")
    return comm


def data(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1000 * seed + rank))
    return (8 * values).to(dtype)


def given(comm: TorchCommunicator, values: torch.Tensor, in_place: bool) -> torch.Tensor:
    return comm.allocate(values.numel(), values.dtype).copy_(values) if in_place else values.clone()


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), (found, wanted)


def check_reductions(comm: TorchCommunicator, plain: TorchCommunicator, n: int, dtype: torch.dtype) -> None:
    world, rank = comm.world, comm.rank
    sources = [data(r, n * world, dtype) for r in range(world)]
    for in_place in (False, True):
        for out_dtype in {dtype, torch.float32}:
            for scale, accumulate in ((1.0, False), (1 / 3, False), (1.0, True), (1 / 3, True)):
                ours, theirs = (data(9, n, out_dtype) for _ in range(2))
                full = given(comm, sources[rank], in_place)
                comm.reduce_scatter(ours, full, scale=scale, accumulate=accumulate).wait()
                plain.reduce_scatter(theirs, sources[rank].clone(), scale=scale, accumulate=accumulate).wait()
                same(ours, theirs)
                same(full, sources[rank])
        total = given(comm, sources[rank], in_place)
        comm.all_reduce(total).wait()
        wanted = torch.empty_like(total)
        sum_chunks(wanted, sources, scale=1.0, accumulate=False)
        same(total, wanted)
        if world == 2:  # where gloo too has only one order to sum in
            theirs = sources[rank].clone()
            plain.all_reduce(theirs).wait()
            same(total, theirs)
        highest = given(comm, sources[rank], in_place)
        comm.all_reduce(highest, op="max").wait()
        if n:
            same(highest, torch.stack(sources).amax(0))


def check_moves(comm: TorchCommunicator, plain: TorchCommunicator, n: int, dtype: torch.dtype) -> None:
    world, rank = comm.world, comm.rank
    mine, root = data(rank, n * world, dtype), world - 1
    for in_place in (False, True):
        outs = []
        for each, own in ((comm, in_place), (plain, False)):
            gathered, exchanged = (torch.zeros(n * world, dtype=dtype) for _ in range(2))
            each.all_gather(gathered, given(comm, mine[:n], own)).wait()
            within = given(comm, gathered, own)
            within.view(world, -1)[rank] += 1
            each.all_gather(within, within.view(world, -1)[rank]).wait()
            each.all_to_all(exchanged, given(comm, mine, own)).wait()
            sent = given(comm, mine, own)
            each.broadcast(sent, root=root).wait()
            outs.append((gathered, within, exchanged, sent))
        for ours, theirs in zip(*outs, strict=True):
            same(ours, theirs)


def check_all(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    comm, plain = wire(), wire(shm=False)
    for n in sizes:
        check_reductions(comm, plain, n, dtype)
        check_moves(comm, plain, n, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@distributed(world_size=2)
def test_two_ranks_give_the_bits_of_the_plain_routes(dtype: torch.dtype) -> None:
    check_all(dtype, SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@distributed(world_size=3)
def test_three_ranks(dtype: torch.dtype) -> None:
    check_all(dtype, (0, 7, 33_001))


@distributed(world_size=4)
def test_four_ranks() -> None:
    check_all(torch.bfloat16, (3, 45_001))


@distributed(world_size=3)
def test_dtypes_that_are_only_moved_and_sums_that_only_torch_makes(rank: int, world: int) -> None:
    comm = wire()
    whole = [torch.arange(12) * (r + 1) for r in range(world)]
    for dtype in (torch.int64, torch.float64, torch.uint8, torch.int32):
        total = given(comm, whole[rank].to(dtype), in_place=rank == 1)
        comm.all_reduce(total).wait()
        assert torch.equal(total, sum(whole).to(dtype))
        out = torch.empty(4, dtype=dtype)
        comm.reduce_scatter(out, whole[rank].to(dtype)).wait()
        assert torch.equal(out, sum(whole)[4 * rank : 4 * rank + 4].to(dtype))
    flags = torch.tensor([rank == 1, False])
    got = torch.empty(2 * world, dtype=torch.bool)
    comm.all_gather(got, flags).wait()
    assert got.tolist() == [False, False, True, False, False, False]


@distributed(world_size=1)
def test_one_rank_has_no_wire() -> None:
    out = torch.empty(4)
    mesh().communicator("dp_shard").reduce_scatter(out, torch.arange(4.0), scale=2.0).wait()
    assert torch.equal(out, 2 * torch.arange(4.0))


@distributed(world_size=3)
def test_some_ranks_in_place_and_others_not(rank: int, world: int) -> None:
    comm = wire()
    for n in (10, 100_000):
        sources = [data(r, n, torch.bfloat16) for r in range(world)]
        wanted = torch.empty(n, dtype=torch.bfloat16)
        sum_chunks(wanted, sources, scale=1.0, accumulate=False)
        for chosen in range(world + 1):
            mine = given(comm, sources[rank], in_place=rank >= chosen)
            comm.all_reduce(mine).wait()
            same(mine, wanted)


@distributed(world_size=2)
def test_tickets_waited_in_any_order(rank: int, world: int) -> None:
    one = mesh()
    first, second = wire(over=one), wire(channel="gather", over=one)
    waiting = []
    for number in range(60):
        n = (number * 7919) % 5000
        comm = first if number % 3 else second
        full = given(comm, data(rank, 2 * n, torch.float32, number), in_place=number % 2 == 0)
        out = torch.empty(n)
        waiting.append((number, n, out, comm.reduce_scatter(out, full, scale=0.5)))
        del full
    random.Random(rank).shuffle(waiting)
    for number, n, out, ticket in waiting:
        ticket.wait()
        ticket.wait()
        parts = [data(r, 2 * n, torch.float32, number)[rank * n : rank * n + n] for r in range(2)]
        same(out, (parts[0] + parts[1]) * 0.5)


@distributed(world_size=3)
def test_ranks_that_come_at_random_times(rank: int, world: int) -> None:
    comm, when = wire(), random.Random(rank)
    slow = SlowCommunicator(comm)
    for number in range(40):
        time.sleep(when.random() * 0.004)
        each = slow if number % 2 else comm
        mine = given(comm, data(rank, 3000, torch.float32, number), in_place=number % 4 < 2)
        others = [data(r, 3000, torch.float32, number) for r in range(world)]
        gathered, exchanged = torch.empty(9000), torch.empty(3000)
        tickets = [each.all_gather(gathered, mine), each.all_to_all(exchanged, mine)]
        time.sleep(when.random() * 0.004)
        for ticket in tickets:
            ticket.wait()
        mine.zero_()  # the others may have yet to read it
        same(gathered, torch.cat(others))
        same(exchanged, torch.cat([other.view(3, -1)[rank] for other in others]))


@distributed(world_size=2)
def test_a_wait_needs_no_peer_to_be_waiting(rank: int, world: int) -> None:
    """Rank 1 comes to its own wait only after rank 0 has done its part and more, over another wire."""
    comm = wire()
    for numel in (64, 400_000):
        full = given(comm, torch.full((numel,), 1.0 + rank), in_place=True)
        whole = given(comm, torch.full((numel,), 1.0 + rank), in_place=True)
        plain = torch.full((numel,), 1.0 + rank)
        out = torch.empty(numel // 2)
        tickets = [comm.reduce_scatter(out, full), comm.all_reduce(whole), comm.all_reduce(plain)]
        if rank == 1:
            dist.barrier()
        for ticket in tickets:
            ticket.wait()
        full.fill_(-1000.0)
        whole += 1000.0
        if rank == 0:
            dist.barrier()
        assert out.unique().tolist() == [3.0]
        assert whole.unique().tolist() == [1003.0]
        assert plain.unique().tolist() == [3.0]


@distributed(world_size=2)
def test_more_under_way_than_a_board_has_entries(rank: int, world: int) -> None:
    comm = wire()
    outs = [torch.empty(2, dtype=torch.int64) for _ in range(2500)]
    tickets = [comm.all_gather(out, torch.tensor([2 * i + rank])) for i, out in enumerate(outs)]
    tickets[-1].wait()
    assert [out.tolist() for out in outs] == [[2 * i, 2 * i + 1] for i in range(2500)]


@distributed(world_size=2)
def test_the_log_counts_what_it_counts_without(rank: int, world: int) -> None:
    logs = []
    for shm in (True, False):
        one = mesh(shm)
        comm = wire(shm, over=one)
        comm.all_gather(torch.empty(64, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)).wait()
        comm.reduce_scatter(torch.empty(32), comm.allocate(64, torch.float32).zero_()).wait()
        comm.all_reduce(torch.zeros(5000)).wait()
        comm.broadcast(torch.zeros(5)).wait()
        logs.append((one.log.calls, one.log.elements, one.log.sent_bytes))
    assert logs[0] == logs[1]


@distributed(world_size=2)
def test_sums_tell_autograd_that_they_have_written(rank: int, world: int) -> None:
    comm, out, total = wire(), torch.zeros(4), torch.ones(8)
    versions = out._version, total._version
    comm.reduce_scatter(out, total).wait()
    comm.all_reduce(total).wait()
    assert (out._version, total._version) > versions
    assert out._version > versions[0]


@distributed(world_size=2)
def test_tensors_that_are_not_in_a_row_are_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=r"contiguous tensor, got shape \(4, 2\) with strides \(1, 4\)"):
        wire().all_reduce(torch.zeros(2, 4).t())
