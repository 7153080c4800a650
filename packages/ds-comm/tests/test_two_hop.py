"""Gradients in two hops: as plain torch rounds them, bytes by hop, any nodes, and who is to blame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm import Fp8, Int4, Int8, NotFiniteError, OneBit, TwoHop
from ds_core.ground.codec import CastCodec
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed, run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from routed import coded, gradient, in_order, own, two_hops

CODECS: dict[str, tuple[Any, Any]] = {
    "int4": (Int4(), Int4()),
    "int8 int4": (Int8(), Int4()),
    "blocks": (Int8(block=64), Int4(block=32)),
    "asymmetric": (Int8(symmetric=False), Int4(symmetric=False)),
    "fp8 onebit": (Fp8(), OneBit(block=64)),
    "onebit": (OneBit(), OneBit()),
    "exact": (CastCodec(torch.float32), CastCodec(torch.float32)),
}


def reduced(owner: FlatOwner, route: TwoHop, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    unit, world = owner.trainable[0], dist.get_world_size()
    full = gradient(unit, dist.get_rank(), step, dtype)
    out = torch.full((unit.layout.shard_numel,), 7.0)
    route.reduce(unit, out, full, scale=1 / world, accumulate=True).wait()
    route.reduce(unit, out, full.clone(), scale=1 / world, accumulate=False).wait()
    return out


@pytest.mark.parametrize("name", CODECS)
@distributed(world_size=4)
def test_two_hops_round_as_plain_torch_does(name: str, rank: int, world: int) -> None:
    intra, inter = CODECS[name]
    owner = own(1, reduce=TwoHop(intra, inter, node_size=2))
    route = owner.routes["reduce"]
    assert isinstance(route, TwoHop)
    assert route.explain().startswith("two hops: ")
    unit = owner.trainable[0]
    full = [gradient(unit, r) for r in range(world)]
    total, _ = two_hops(full, intra, inter, 2)
    found = reduced(owner, route)
    assert torch.equal(found, total[unit.span] * 0.25)
    exact = in_order(full)[unit.span] / world
    if name == "exact":
        pairs = (full[0] + full[1]) + (full[2] + full[3])
        assert torch.equal(found, pairs[unit.span] * 0.25)
    else:
        assert not torch.equal(found, exact)
        assert bool(((found - exact).abs() <= bound(full, intra, inter)[unit.span]).all())


def bound(full: list[Tensor], intra: Any, inter: Any) -> Tensor:
    """Of the mean, [numel]: what each rank's coding may lose, and each node's of a sum that is off by that.

    A magnitude alone (a sign bit's) says nothing of sums that are off, and a codec's bound grows with what it
    is given: so what a node codes is taken as large as it can be.
    """
    world, n = len(full), full[0].numel() // len(full)
    total = torch.zeros(world * n, dtype=torch.float64)
    for first in (0, 2):
        pair = [part.view(world, n) for part in full[first : first + 2]]
        off = sum((intra.error_bound(part) for part in pair), torch.zeros(world, n, dtype=torch.float64))
        exact = pair[0].double() + pair[1]
        if isinstance(inter, OneBit):  # |x| - s, where either may be off by what came before
            each = inter.error_bound(exact) + 2 * off.amax(1, keepdim=True)
        elif getattr(inter, "format", "")[:1] == "u":
            each = (exact.amax(1) - exact.amin(1) + 2 * off.amax(1)).unsqueeze(1) / 15
            each = each.expand_as(exact)
        else:
            each = inter.error_bound((exact.abs() + off).float()) * (1 + 2**-20)
        total += (off + each).view(-1)
    return total / world + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@distributed(world_size=4)
def test_gradients_of_low_precision(dtype: torch.dtype, world: int) -> None:
    owner = own(1, reduce=TwoHop(Int8(), Int4(), node_size=2))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    full = [gradient(unit, r, 0, dtype).float() for r in range(world)]
    total, _ = two_hops(full, Int8(), Int4(), 2)
    assert torch.equal(reduced(owner, route, dtype=dtype), total[unit.span] * 0.25)


@pytest.mark.parametrize(("world", "node"), [(4, 4), (4, 1), (2, 2), (2, 1)])
def test_one_hop_where_there_are_not_two(world: int, node: int) -> None:
    run_ranks(one_hop, world, node=node)


def one_hop(node: int) -> None:
    world = dist.get_world_size()
    owner = own(1, reduce=TwoHop(Int8(), Int4(), node_size=node))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    codec: Any = Int8() if node == world else Int4()
    why = "all ranks are on one node" if node == world else "each rank is a node of its own"
    assert route.explain() == f"one hop: {codec!r}, as {why}; {world} ranks"
    rows = [coded(codec, gradient(unit, r).view(world, -1)) for r in range(world)]
    assert torch.equal(reduced(owner, route), in_order(rows).view(-1)[unit.span] * (1 / world))
    hop = "node" if node == world else "across"
    assert set(owner.mesh.log.bytes_by_axis()) == {f"dp_shard/{hop}"}


@distributed(world_size=4)
def test_bytes_by_hop(world: int) -> None:
    owner = own(1, reduce=TwoHop(Int8(), Int4(), node_size=2))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    owner.mesh.log.clear()
    full, out = gradient(unit, dist.get_rank()), torch.empty(unit.layout.shard_numel)
    route.reduce(unit, out, full, scale=1.0, accumulate=False).wait()
    chunk = unit.layout.numel // world
    assert owner.mesh.log.bytes_by_axis() == {
        "dp_shard/node": 2 * (2 - 1) * Int8().wire_bytes(chunk),
        "dp_shard/across": (2 - 1) * Int4().wire_bytes(chunk),
    }


@pytest.mark.parametrize(("world", "node"), [(4, 2), (3, 3), (3, 1)])
def test_stage_zero_gives_the_mean_to_all(world: int, node: int) -> None:
    results = run_ranks(stage_zero, world, node=node)
    assert all(result == results[0] for result in results)


def stage_zero(node: int) -> list[float]:
    world = dist.get_world_size()
    owner = own(0, reduce=TwoHop(Int8(), Int8(), node_size=node))
    unit = owner.trainable[0]
    params = dict(zip((slot.fqn for slot in unit.layout.slots), unit.params, strict=True))
    full = gradient(unit, dist.get_rank())
    for slot in unit.layout.slots:
        values = full[slot.start : slot.end].view(slot.shape)
        (params[slot.fqn] * values).sum().backward()
    owner.drain()
    assert unit.gradient is not None
    size = -(-unit.layout.numel // world) * world
    given = [torch.nn.functional.pad(gradient(unit, r), (0, size - full.numel())) for r in range(world)]
    if node in (1, world):
        total = in_order([coded(Int8(), part.view(world, -1)) for part in given]).view(-1)
    else:
        total, _ = two_hops(given, Int8(), Int8(), node)
    mean = coded(Int8(), (total * (1 / world)).view(world, -1)).view(-1)
    assert torch.equal(unit.gradient, mean[: full.numel()])
    return list(map(float, unit.gradient[:50]))


@pytest.mark.parametrize("stage", [0, 1])
@distributed(world_size=4)
def test_what_is_not_finite_is_named_on_every_rank(stage: int, rank: int) -> None:
    owner = own(stage, reduce=TwoHop(Int8(), Int4(), node_size=2))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    full = gradient(unit, rank)
    if rank == 2:
        slot = unit.layout.slots[3]
        full[slot.start + 1] = torch.inf
    out = torch.empty(unit.layout.shard_numel)
    with pytest.raises(NotFiniteError, match=r"the gradient of 1\.bias \(rank 2\): int4 was given"):
        route.reduce(unit, out, full, scale=0.25, accumulate=False).wait()


@distributed(world_size=4)
def test_told_to_mark_all_ranks_get_nan(rank: int) -> None:
    codecs = (Int8(nonfinite="mark"), Int4(nonfinite="mark"))
    owner = own(1, reduce=TwoHop(*codecs, node_size=2))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    full, out = gradient(unit, rank), torch.empty(unit.layout.shard_numel)
    if rank == 1:
        full[0] = torch.nan
    route.reduce(unit, out, full, scale=0.25, accumulate=False).wait()
    assert bool(out.isnan().any())


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ("Int8()", "Int4()"),
        ("Int8(block=256)", "Int8(block=128)"),
        ("Int8(rounding='stochastic', seed=1)", "Int8(rounding='stochastic', seed=2)"),
    ],
)
@distributed(world_size=2)
def test_ranks_that_disagree_are_named(mine: str, other: str, rank: int) -> None:
    made = {"Int8": Int8, "Int4": Int4}
    name, _, given = (mine if rank == 0 else other).rstrip(")").partition("(")
    options: dict[str, Any] = dict(part.split("=") for part in given.split(", ") if part)
    options = {k: v.strip("'") if k == "rounding" else int(v) for k, v in options.items()}
    with pytest.raises(
        ValueError,
        match=r"ranks disagree on how gradients travel \(TwoHop\): codecs is .* on rank 0; .* on rank 1",
    ):
        own(1, reduce=TwoHop(made[name](**options), Int4()))


@distributed(world_size=4)
def test_nodes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="node_size=3 does not divide the 4 ranks"):
        own(1, reduce=TwoHop(Int8(), Int4(), node_size=3))


def test_an_unconnected_route_says_so() -> None:
    with pytest.raises(RuntimeError, match="shard a model with it first"):
        TwoHop(Int8(), Int4()).explain()


def test_one_rank_is_exact() -> None:
    owner = own(1, reduce=TwoHop(Int4(), Int4()))
    route, unit = owner.routes["reduce"], owner.trainable[0]
    assert isinstance(route, TwoHop)
    full, out = gradient(unit, 0), torch.zeros(unit.layout.numel)
    route.reduce(unit, out, full, scale=0.5, accumulate=True).wait()
    assert torch.equal(out, full * 0.5)
    assert route.explain() == "no hop: there is one rank"
