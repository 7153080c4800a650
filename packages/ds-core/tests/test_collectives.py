"""Every collective, on every route, equals what the ranks' data says it must be."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.codec import CastCodec, gather_coded, reduce_coded
from ds_core.ground.collectives import LocalCommunicator, TorchCommunicator, sum_chunks
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import distributed


def communicator() -> TorchCommunicator:
    comm = Topology().build(Accelerator(torch.device("cpu"))).communicator("dp_shard", "reduce")
    assert isinstance(comm, TorchCommunicator)
    return comm


def data(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
    return values.to(dtype)


def check_all(world: int, rank: int, shard: int, dtype: torch.dtype) -> None:
    comm = communicator()
    sources = [data(r, shard * world, dtype) for r in range(world)]
    mine = sources[rank][:shard].clone()
    gathered = torch.empty(shard * world, dtype=dtype)
    comm.all_gather(gathered, mine).wait()
    assert torch.equal(gathered, torch.cat([source[:shard] for source in sources]))
    in_place = gathered.clone()
    in_place.view(world, -1)[rank] += 1
    comm.all_gather(in_place, in_place.view(world, -1)[rank]).wait()
    assert torch.equal(in_place, gathered + 1)
    chunks = [source.view(world, -1)[rank] for source in sources]
    expected = chunks[0].float()
    for chunk in chunks[1:]:
        expected = expected + chunk.float()
    out = torch.empty(shard)
    comm.reduce_scatter(out, sources[rank], scale=0.5).wait()
    assert torch.equal(out, expected * 0.5)
    comm.reduce_scatter(out, sources[rank], scale=0.5, accumulate=True).wait()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)
    exchanged = torch.empty(shard * world, dtype=dtype)
    comm.all_to_all(exchanged, sources[rank]).wait()
    assert torch.equal(exchanged, torch.cat(chunks))
    total = sources[rank].to(torch.float32, copy=True)
    comm.all_reduce(total).wait()
    torch.testing.assert_close(total, torch.stack([s.float() for s in sources]).sum(0))
    highest = sources[rank].to(torch.float32, copy=True)
    comm.all_reduce(highest, op="max").wait()
    assert torch.equal(highest, torch.stack([s.float() for s in sources]).amax(0))
    sent = sources[rank].clone()
    comm.broadcast(sent, root=world - 1).wait()
    assert torch.equal(sent, sources[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@distributed(world_size=2)
def test_two_ranks(rank: int, world: int, dtype: torch.dtype) -> None:
    check_all(world, rank, 24, dtype)


@distributed(world_size=3)
def test_three_ranks(rank: int, world: int) -> None:
    check_all(world, rank, 40, torch.float32)


@distributed(world_size=2)
def test_sizes_that_are_probed(rank: int, world: int) -> None:
    check_all(world, rank, 600_000, torch.bfloat16)


@distributed(world_size=2)
def test_a_slow_wire_is_not_probed_over_and_over(rank: int) -> None:
    """One message says that the wire is the limit; rank 0's clock decides for both."""
    routes = communicator()._routes
    taken: list[str] = []

    def slow(out: torch.Tensor, src: torch.Tensor, tag: int) -> list[object]:
        taken.append("slow")
        time.sleep(0.3 if rank == 0 else 0.0)
        return []

    def other(out: torch.Tensor, src: torch.Tensor, tag: int) -> list[object]:
        taken.append("other")
        return []

    assert routes._probe("all_to_all", 1 << 20, (slow, other)) is slow
    assert taken == ["slow"]
    taken.clear()
    assert routes._probe("all_to_all", 1 << 20, (other, other)) is other
    assert len(taken) == 1 + 2 * 3


@distributed(world_size=3)
def test_every_route_gives_the_same_bits(rank: int, world: int) -> None:
    routes = communicator()._routes
    shard = torch.full((1000,), float(rank))
    full = data(rank, 1000 * world, torch.float32)
    gathers, exchanges = [], []
    for route in (routes._gather_direct, routes._gather_broadcasts, routes._gather_native):
        out = torch.zeros(1000 * world)
        mine = out.view(world, -1)[rank]
        mine.copy_(shard)
        for work in route(out, mine, 1):
            work.wait()
        gathers.append(out)
    for exchange in (routes._exchange_direct, routes._exchange_native):
        out = torch.zeros(1000 * world)
        for work in exchange(out, full, 1):
            work.wait()
        out.view(world, -1)[rank].zero_()
        exchanges.append(out)
    assert all(torch.equal(gathers[0], other) for other in gathers[1:])
    assert torch.equal(exchanges[0], exchanges[1])


@distributed(world_size=2)
def test_many_in_flight_do_not_mix(rank: int, world: int) -> None:
    comm = communicator()
    outs = [torch.empty(2 * n) for n in (64, 8, 512, 16)]
    tickets = []
    for number, out in enumerate(outs):
        tickets.append(comm.all_gather(out, torch.full((out.numel() // 2,), 10.0 * number + rank)))
    for number in (2, 0, 3, 1):
        tickets[number].wait()
        halves = outs[number].view(2, -1)
        assert torch.equal(halves, torch.tensor([[10.0 * number], [10.0 * number + 1]]).expand_as(halves))


@distributed(world_size=2)
def test_log_counts_elements_and_bytes(rank: int, world: int) -> None:
    mesh = Topology().build(Accelerator(torch.device("cpu")))
    comm = mesh.communicator("dp_shard", "reduce")
    comm.all_gather(torch.empty(64, dtype=torch.bfloat16), torch.empty(32, dtype=torch.bfloat16)).wait()
    comm.reduce_scatter(torch.empty(32), torch.empty(64)).wait()
    log = mesh.log
    assert log.elements == {("dp_shard", "all_gather"): 64, ("dp_shard", "reduce_scatter"): 64}
    assert log.sent_bytes == {("dp_shard", "all_gather"): 64, ("dp_shard", "reduce_scatter"): 128}
    assert log.bytes_by_axis() == {"dp_shard": 192}


class Halves:
    """A codec that only the generic path can carry: two values to a byte, in steps of 1/2 from -4 to 3.5."""

    def wire_bytes(self, numel: int) -> int:
        return numel // 2

    def encode(self, src: torch.Tensor, wire: torch.Tensor) -> None:
        steps = (src.float() * 2).round().clamp(-8, 7).to(torch.int16) + 8
        wire.copy_((steps[:, ::2] * 16 + steps[:, 1::2]).to(torch.uint8))

    def decode(self, wire: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        both = torch.stack([wire // 16, wire % 16], dim=-1).flatten(1).float()
        values = ((both - 8) / 2).to(out.dtype)
        if accumulate:
            out.add_(values)
        else:
            out.copy_(values)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: object) -> None:
        assert not state


@pytest.mark.parametrize("codec", ["cast", "halves"])
@distributed(world_size=2)
def test_collectives_through_a_codec(rank: int, world: int, codec: str) -> None:
    """Values that both codecs carry exactly, so that equality is exact."""
    comm = communicator()
    chosen = CastCodec(torch.bfloat16) if codec == "cast" else Halves()
    source = (torch.arange(32) % 8 - 4 + 0.5 * rank).float()
    out = torch.empty(64)
    gather_coded(comm, chosen, out, source).wait()  # type: ignore[arg-type]
    assert torch.equal(out, torch.cat([source - 0.5 * rank, source - 0.5 * rank + 0.5]))
    full = source.repeat(2)
    shard = torch.full((32,), 1.0)
    reduce_coded(comm, chosen, shard, full, scale=0.5, accumulate=True).wait()  # type: ignore[arg-type]
    assert torch.equal(shard, 1.0 + (2 * (source - 0.5 * rank) + 0.5) / 2)


def test_sum_in_blocks_equals_sum_at_once() -> None:
    chunks = [data(r, 200_001, torch.bfloat16) for r in range(3)]
    expected = (chunks[0].float() + chunks[1].float() + chunks[2].float()) * 0.25
    out = torch.empty(200_001)
    sum_chunks(out, chunks, scale=0.25, accumulate=False)
    assert torch.equal(out, expected)
    sum_chunks(out, chunks, scale=0.25, accumulate=True)
    torch.testing.assert_close(out, expected * 2, rtol=1e-6, atol=1e-7)


def test_one_rank_needs_no_group() -> None:
    comm = LocalCommunicator(torch.device("cpu"))
    out = torch.empty(4)
    comm.reduce_scatter(out, torch.arange(4.0), scale=2.0).wait()
    assert torch.equal(out, 2 * torch.arange(4.0))
    with pytest.raises(ValueError, match="no process group"):
        Topology().build(Accelerator(torch.device("cpu"))).group("dp_shard")


def test_unknown_reduction_is_refused() -> None:
    dist.init_process_group("fake", rank=0, world_size=4)
    try:
        mesh = Topology().build(Accelerator(torch.device("cpu")))
        with pytest.raises(ValueError, match='"sum" or "max", got \'min\''):
            mesh.communicator("dp_shard").all_reduce(torch.zeros(1), op="min")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("degrees", "world", "expected"),
    [
        ({}, 6, {"dp_shard": 6}),
        ({"tp": 2}, 6, {"dp_shard": 3}),
        ({"dp_shard": 2, "tp": 3}, 6, {"dp_shard": 2}),
    ],
)
def test_topology_fills_in_what_is_left(
    degrees: dict[str, int], world: int, expected: dict[str, int]
) -> None:
    assert expected.items() <= Topology(**degrees).degrees(world).items()


@pytest.mark.parametrize(
    ("degrees", "match"),
    [
        ({"tp": 4}, "multiple of 4 ranks, the job has 6"),
        ({"dp_shard": 4}, "need 4 ranks"),
        ({"tp": 0}, "positive"),
    ],
)
def test_topology_says_what_does_not_fit(degrees: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Topology(**degrees).degrees(6)
