"""A communicator with a codec in it: what it codes, what it leaves alone, and how many bytes that is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ds_comm import CodedCommunicator, Int8
from ds_core.ground.mesh import Topology
from ds_core.ground.wire import Communicator
from ds_core.testing.distributed import distributed

sys.path.insert(0, str(Path(__file__).parent))
from routed import coded, in_order

N = 101


def data(rank: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


@distributed(world_size=2)
def test_every_collective(rank: int, world: int) -> None:
    mesh = Topology().build()
    comm = CodedCommunicator(mesh.communicator("dp_shard"), gather=Int8(block=64), reduce=Int8())
    assert isinstance(comm, Communicator)
    assert (comm.rank, comm.world) == (rank, world)
    found = comm.allocate(world * N, torch.float32)
    comm.all_gather(found, data(rank, N)).wait()
    assert torch.equal(
        found.view(world, N), torch.cat([coded(Int8(block=64), data(r, N)[None]) for r in (0, 1)])
    )
    width = Int8(block=64).wire_bytes(N)
    assert dict(mesh.log.sent_bytes) == {("dp_shard", "all_gather"): width}
    out = torch.ones(N)
    comm.reduce_scatter(out, data(rank, world * N), scale=0.5, accumulate=True).wait()
    rows = [coded(Int8(), data(r, world * N).view(world, N))[rank] for r in range(world)]
    assert torch.equal(out, 1 + in_order(rows) * 0.5)
    assert mesh.log.sent_bytes["dp_shard", "all_to_all"] == Int8().wire_bytes(N)
    total = data(rank, N).view(1, N)
    comm.all_reduce(total).wait()
    n = -(-N // world)
    given = [torch.nn.functional.pad(data(r, N), (0, n * world - N)).view(world, n) for r in range(world)]
    chunks = in_order([coded(Int8(), each) for each in given])
    again = torch.cat([coded(Int8(), chunk[None]) for chunk in chunks]).view(-1)[:N]
    assert torch.equal(total.view(-1), again)


@distributed(world_size=2)
def test_what_is_left_alone(rank: int, world: int) -> None:
    mesh = Topology().build()
    comm = CodedCommunicator(mesh.communicator("dp_shard"), gather=Int8(), reduce=Int8())
    plain = mesh.communicator("dp_shard")
    largest = data(rank, N)
    comm.all_reduce(largest, op="max").wait()
    assert torch.equal(largest, torch.maximum(data(0, N), data(1, N)))
    counts = torch.arange(N) + rank
    comm.all_reduce(counts).wait()
    assert torch.equal(counts, 2 * torch.arange(N) + 1)
    numbers = torch.empty(world * 3, dtype=torch.int64)
    comm.all_gather(numbers, torch.full((3,), rank)).wait()
    assert numbers.tolist() == [0, 0, 0, 1, 1, 1]
    for made in (comm, plain):
        moved = torch.empty(world * N)
        made.all_to_all(moved, data(rank, world * N)).wait()
        assert torch.equal(moved[:N], data(0, world * N).view(world, N)[rank])
        sent = data(rank, N)
        made.broadcast(sent, root=1).wait()
        assert torch.equal(sent, data(1, N))
    bare = CodedCommunicator(plain)
    total = data(rank, N)
    bare.all_reduce(total).wait()
    assert torch.equal(total, data(0, N) + data(1, N))
