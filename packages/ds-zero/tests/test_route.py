"""Routes: gradients and parameters by another way than one collective, and what a route remembers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_core import CheckpointStore, ReplicatedOwner, ShardedOptimizer
from ds_core.ground.ticket import Ticket
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_zero import Zero, full_tensor, shard


class Remembering:
    """Collectives as they are, and per unit how many there were and what the last one brought."""

    def __init__(self, *, whole_grads: bool = False) -> None:
        self.whole_grads = whole_grads
        self.connected = 0
        self.reduced: dict[str, int] = {}
        self.last: dict[str, Tensor] = {}
        self.loaded: Json = None

    def connect(self, owner: FlatOwner) -> None:
        self.connected += 1
        self.units = {unit.key: unit for unit in owner.trainable}
        self.comm = owner.comm if owner.sharded else None
        self.everyone, self.rank = owner.everyone, owner.everyone.rank
        self.last = {unit.key: torch.zeros(unit.layout.shard_numel) for unit in owner.trainable}

    def reduce(self, unit: FlatUnit, out: Tensor, full: Tensor, *, scale: float, accumulate: bool) -> Ticket:
        self.reduced[unit.key] = self.reduced.get(unit.key, 0) + 1
        if self.comm is None:
            total = full.float()
            ticket = self.everyone.all_reduce(total, about=unit.about)
        else:
            total = torch.zeros(out.numel())
            ticket = self.comm.reduce_scatter(total, full.float(), about=unit.about)

        def keep() -> None:
            self.last[unit.key].copy_(total)
            if not accumulate:
                out.zero_()
            out.add_(total, alpha=scale)

        return Ticket([ticket], keepalive=(full, total), finish=keep)

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        found: dict[str, Any] = {"counts": dict(self.reduced)}
        for key, unit in self.units.items():
            for overlap in unit.layout.overlaps(unit.rank):
                local = self.last[key][slice(*overlap.local)]
                found[overlap.slot.fqn] = FlatShard(local, overlap.slot.shape, overlap.begin)
        return found

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        return {k: v for k, v in self.state_dict().items() if k in saved and isinstance(v, FlatShard)}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        self.loaded = dict(values)


class Spreading(Remembering):
    """An all-gather that looks at what the last one brought."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Tensor] = []

    def connect(self, owner: FlatOwner) -> None:
        super().connect(owner)
        self.wire = owner.gather_comm

    def gather(self, unit: FlatUnit, shard: Tensor) -> Ticket:
        self.before.append(unit.whole.clone())
        return self.wire.all_gather(unit.whole, shard, about=unit.about)


class Quarters:
    """A codec that knows multiples of a quarter."""

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, src: Tensor, wire: Tensor) -> None:
        wire.view(torch.int16).copy_((src * 4).round())

    def decode(self, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        values = wire.view(torch.int16).to(out.dtype) / 4
        out.copy_(out + values if accumulate else values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: torch.nn.Module, seed: int, micro: int = 1) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for number in range(micro):
        batch = CASES["mlp"].rank_batch(seed + number, rank, ranks)
        (torch.stack(CASES["mlp"].losses(model, batch)).sum() / micro).backward()


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(param) for name, param in model.named_parameters()}


def own(model: torch.nn.Module, stage: int, **options: Any) -> FlatOwner:
    if stage == 0:
        return ReplicatedOwner(model, bucket_numel=1, **options)
    return Zero(stage=stage, bucket_numel=1, keep_numel=1).shard(model, **options)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("whole_grads", [False, True])
@distributed(world_size=2)
def test_gradients_take_the_route(stage: int, whole_grads: bool) -> None:
    route = Remembering(whole_grads=whole_grads)
    model = CASES["mlp"].build()
    owner = own(model, stage, reduce=route)
    optimizer = ShardedOptimizer(sgd(model), owner)
    twin = Twin(CASES["mlp"], sgd, ranks=2)
    for step in range(4):
        train(model, 10 * step, micro=3)
        optimizer.step()
        optimizer.zero_grad()
        twin.step([CASES["mlp"].make_batch(10 * step + m, 2) for m in range(3)])
    assert_close_norm(whole(model), twin.parameters(), 1e-5)
    # The first step cannot know that three rounds come; afterwards a unit travels once, or in every round.
    once = whole_grads or stage < 2
    assert set(route.reduced.values()) == {4 if once else 12}, route.reduced


@distributed(world_size=2)
def test_an_optimizer_brings_its_route(rank: int) -> None:
    route = Remembering()
    model = CASES["mlp"].build()
    optimizer = sgd(model)
    optimizer.route = route  # type: ignore[attr-defined]
    shard(model, optimizer, stage=2)
    train(model, 0)
    optimizer.step()
    assert set(route.reduced.values()) == {1}


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_parameters_take_the_route(stage: int) -> None:
    route = Spreading()
    model = CASES["mlp"].build()
    owner = own(model, stage, gather=route)
    optimizer = ShardedOptimizer(sgd(model), owner)
    twin = Twin(CASES["mlp"], sgd, ranks=2)
    for step in range(2):
        train(model, 10 * step)
        optimizer.step()
        optimizer.zero_grad()
        twin.step([CASES["mlp"].make_batch(10 * step, 2)])
    assert_close_norm(whole(model), twin.parameters(), 1e-5)
    if stage == 1:  # of the other rank each gather found what the one before had brought
        fresh = own(CASES["mlp"].build(), stage)
        start = [unit.whole.view(2, -1)[1 - route.rank] for unit in fresh.trainable]
        found = [whole.view(2, -1)[1 - route.rank] for whole in route.before[: len(start)]]
        assert all(torch.equal(one, other) for one, other in zip(found, start, strict=True))


@distributed(world_size=2)
def test_what_a_route_remembers_is_in_the_checkpoint(tmp_path: Path) -> None:
    route = Remembering()
    model = CASES["mlp"].build()
    owner = own(model, 2, reduce=route)
    optimizer = ShardedOptimizer(sgd(model), owner)
    train(model, 0)
    optimizer.step()
    before = {key: value.clone() for key, value in route.last.items()}
    owner_before = {unit.key: unit.values().clone() for unit in owner.units}
    parts = {"model": owner, "optimizer": optimizer}
    CheckpointStore(tmp_path).save(1, parts)
    other = Remembering()
    model = CASES["mlp"].build()
    owner = own(model, 2, reduce=other)
    CheckpointStore(tmp_path).load({"model": owner, "optimizer": ShardedOptimizer(sgd(model), owner)}, 1)
    assert other.loaded == {"counts": route.reduced}
    assert all(torch.equal(other.last[key], value) for key, value in before.items())
    model = CASES["mlp"].build()
    owner = own(model, 1)  # a run without the route takes the rest
    CheckpointStore(tmp_path).load({"model": owner, "optimizer": ShardedOptimizer(sgd(model), owner)}, 1)
    for unit in owner.units:
        assert torch.equal(unit.values(), owner_before[unit.key])


@distributed(world_size=3)
def test_stage_zero_sends_what_its_codec_says(rank: int) -> None:
    """At 3 ranks no chunk fits evenly; the mean is rounded to quarters twice, on every rank alike."""
    model = CASES["mlp"].build()
    owner = own(model, 0, reduce=Quarters())
    train(model, 0)
    owner.drain()
    by_op = owner.mesh.log.sent_bytes
    sent = sum(count for (_, op), count in by_op.items() if op in ("all_to_all", "all_gather"))
    for unit in owner.trainable:
        assert unit.gradient is not None
        mean = unit.gradient
        first = mean.clone()
        owner.comm.broadcast(first).wait()
        assert torch.equal(mean, first)
        assert torch.equal((mean * 4).round(), mean * 4)
    assert sent == sum(2 * 2 * 2 * -(-unit.layout.numel // 3) for unit in owner.trainable)
