"""Parameters on their way to whole copies: coded once, the same everywhere; differences that catch up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm import Delta, Int4, Int8, NotFiniteError, QuantizedWeights
from ds_core import CheckpointStore
from ds_core.ground.codec import CastCodec
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed, run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from routed import coded, own


def shard_of(owner: FlatOwner, rank: int, step: int) -> Tensor:
    """A rank's part of new values: near the first ones, zero in the padding."""
    unit = owner.trainable[0]
    torch.manual_seed(step)
    full = torch.zeros(unit.layout.numel)
    for slot in unit.layout.slots:
        full[slot.start : slot.end] = torch.randn(slot.numel) * 0.01 * step + torch.linspace(
            -1, 1, slot.numel
        )
    return full.view(unit.layout.world, -1)[rank].clone()


def gather(owner: FlatOwner, step: int) -> Tensor:
    unit, route = owner.trainable[0], owner.routes["gather"]
    assert isinstance(route, QuantizedWeights)
    shard = shard_of(owner, unit.rank, step)
    unit.whole[unit.span].copy_(shard)  # as the owner does: this rank's own part is new already
    route.gather(unit, shard).wait()
    return unit.whole.clone()


@pytest.mark.parametrize(("world", "node"), [(4, 2), (4, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", ["int8", "exact"])
def test_all_ranks_have_what_the_shards_decode_to(world: int, node: int, name: str) -> None:
    run_ranks(gathers, world, node=node, name=name)


def gathers(node: int, name: str) -> None:
    world = dist.get_world_size()
    codec: Any = {"int8": Int8(symmetric=False), "exact": CastCodec(torch.float32)}[name]
    owner = own(1, gather=QuantizedWeights(codec, node_size=node))
    found = gather(owner, 1)
    parts = torch.stack([shard_of(owner, rank, 1) for rank in range(world)])
    wanted = torch.cat([coded(codec, part.view(1, -1)) for part in parts]).view(-1)
    assert torch.equal(found, wanted)
    assert torch.equal(found, parts.view(-1)) == (name == "exact")
    gap = (found - parts.view(-1)).abs().double()
    assert bool((gap <= codec.error_bound(parts).view(-1)).all())
    width, sent = codec.wire_bytes(owner.trainable[0].layout.shard_numel), owner.mesh.log.bytes_by_axis()
    nodes = world // node
    assert sent.get("dp_shard/across", 0) == (nodes - 1) * width
    assert sent.get("dp_shard/node", 0) == nodes * (node - 1) * width


@distributed(world_size=4)
def test_in_one_hop_when_told(world: int) -> None:
    owner = own(1, gather=QuantizedWeights(Int8(), hierarchical=False))
    route = owner.routes["gather"]
    assert isinstance(route, QuantizedWeights)
    assert route.explain().startswith("one hop: Int8(")
    once = gather(owner, 1)
    width = Int8().wire_bytes(owner.trainable[0].layout.shard_numel)
    assert owner.mesh.log.bytes_by_axis() == {"dp_shard": (world - 1) * width}
    twice = own(1, gather=QuantizedWeights(Int8(), node_size=2))
    assert torch.equal(gather(twice, 1), once)


@pytest.mark.parametrize("route", ["QuantizedWeights", "Delta"])
@distributed(world_size=4)
def test_what_is_not_finite_is_named_on_every_rank(route: str, rank: int) -> None:
    owner = own(1, gather={"QuantizedWeights": QuantizedWeights, "Delta": Delta}[route](Int8(), node_size=2))
    unit, found = owner.trainable[0], owner.routes["gather"]
    assert isinstance(found, QuantizedWeights)
    shard = shard_of(owner, rank, 1)
    if rank == 3:
        shard[2] = torch.nan
    fqn = unit.layout.overlaps(3)[0].slot.fqn.replace(".", r"\.")
    with pytest.raises(NotFiniteError, match=rf"the value of {fqn} \(rank 3\): int8"):
        found.gather(unit, shard).wait()


def test_nothing_is_cut_at_stage_zero() -> None:
    with pytest.raises(ValueError, match="gather codec does not go with stage 0"):
        own(0, gather=QuantizedWeights(Int8()))


@distributed(world_size=2)
def test_ranks_that_disagree_are_named(rank: int) -> None:
    with pytest.raises(ValueError, match="ranks disagree on how parameters travel"):
        own(1, gather=QuantizedWeights(Int8(block=64 * (rank + 1))))


@distributed(world_size=4)
def test_differences_add_up_to_the_values(world: int) -> None:
    """The copy is the last one and what its difference decodes to, and lags by the codec's bound at most."""
    codec = Int4()
    owner = own(1, gather=Delta(codec, node_size=2))
    unit = owner.trainable[0]
    whole = unit.whole.clone()
    for step in range(1, 6):
        found = gather(owner, step)
        values = torch.stack([shard_of(owner, rank, step) for rank in range(world)])
        gaps = values - whole.view(world, -1)
        bound = codec.error_bound(gaps).view(-1)
        whole += torch.cat([coded(codec, gap.view(1, -1)) for gap in gaps]).view(-1)
        assert torch.equal(found, whole), step
        lag = (found - values.view(-1)).abs().double()
        assert float(lag.max()) > 0
        assert bool((lag <= bound + 1e-6).all())
    for _ in range(8):  # nothing changes any more: the copy catches up, a 14th of what is left each time
        found = gather(owner, 5)
    assert float((found - values.view(-1)).abs().max()) < 1e-6


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 2), (2, 4)])
def test_a_checkpoint_brings_the_lag_back(tmp_path: Path, before: int, after: int) -> None:
    found = run_ranks(publish, before, folder=tmp_path)
    again = run_ranks(load, after, folder=tmp_path)
    assert all(each == found[0] for each in found)
    assert all(each[0] == found[0][0] for each in again)
    assert (again[0][1] == found[0][1]) == (before == after)  # blocks lie otherwise at another world


def used(owner: FlatOwner) -> list[float]:
    unit, values = owner.trainable[0], []
    for slot in unit.layout.slots:
        values += unit.whole[slot.start : slot.end].tolist()
    return values


def lagging() -> FlatOwner:
    """An asymmetric codec would move the padding, too, which no checkpoint holds."""
    return own(1, gather=Delta(Int4(symmetric=False), node_size=2))


def publish(folder: Path) -> list[list[float]]:
    owner = lagging()
    for step in range(1, 4):
        gather(owner, step)
    CheckpointStore(folder).save(1, {"route": owner.routes["gather"]})
    saved, unit = used(owner), owner.trainable[0]
    assert unit.layout.used_numel < unit.layout.numel
    assert not bool(unit.whole[unit.layout.used_numel :].any())
    gather(owner, 4)
    return [saved, used(owner)]


def load(folder: Path) -> list[list[float]]:
    owner = lagging()
    gather(owner, 5)
    CheckpointStore(folder).load({"route": owner.routes["gather"]}, 1)
    found = used(owner)
    unit, before = owner.trainable[0], owner.trainable[0].whole.clone()
    after = gather(owner, 4)
    gap = shard_of(owner, unit.rank, 4) - before[unit.span]
    wanted = before[unit.span] + coded(Int4(symmetric=False), gap.view(1, -1))[0]
    assert torch.equal(used_part(owner, after), used_part(owner, wanted, cut=True))
    return [found, used(owner)]


def used_part(owner: FlatOwner, values: Tensor, *, cut: bool = False) -> Tensor:
    """This rank's part of all values, or the part itself, without the padding."""
    unit = owner.trainable[0]
    part = values if cut else values[unit.span]
    return torch.cat([part[slice(*overlap.local)] for overlap in unit.layout.overlaps(unit.rank)])


@distributed(world_size=2)
def test_without_a_saved_lag_the_next_copy_is_exact(world: int) -> None:
    owner = own(1, gather=Delta(Int4()))
    gather(owner, 1)
    route = owner.routes["gather"]
    assert route.load_targets({}) == {}
    route.load_state_dict({})
    values = torch.cat([shard_of(owner, rank, 2) for rank in range(world)])
    assert torch.equal(gather(owner, 2), values)
    assert not torch.equal(gather(owner, 3), torch.cat([shard_of(owner, rank, 3) for rank in range(world)]))
