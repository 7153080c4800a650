"""Shards inside a node, copies across nodes: two nodes of two ranks, by name only."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.ground.mesh import Mesh, Topology
from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.owner import FlatOwner, ReplicatedOwner
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, Case
from ds_core.testing.parity import Twin, assert_close_norm
from ds_core.train.optim import ShardedOptimizer
from ds_zero import Zero, ZeroOwner, clip_grad_norm_, full_grad, full_tensor, gather

CASE = CASES["tied"]
STEPS = 3


def nodes() -> Mesh:
    return Topology(dp_replicate=2, dp_shard=2).build()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def build(
    mesh: Mesh, stage: int, case: Case = CASE, **settings: object
) -> tuple[nn.Module, ShardedOptimizer, ZeroOwner]:
    model = case.build()
    optimizer = sgd(model)
    config = Zero.model_validate({"stage": stage, "bucket_numel": 1, "keep_numel": 0, **settings})
    owner = config.shard(model, mesh)
    return model, ShardedOptimizer(optimizer, owner), owner


def backward(model: nn.Module, seed: int, micro: int, case: Case = CASE) -> None:
    for number in range(micro):
        batch = case.rank_batch(seed + number, dist.get_rank(), dist.get_world_size())
        (torch.stack(case.losses(model, batch)).sum() / micro).backward()


def train(model: nn.Module, optimizer: ShardedOptimizer, micro: int, max_norm: float | None = None) -> None:
    for step in range(STEPS):
        backward(model, 10 * step, micro)
        if max_norm is not None:
            clip_grad_norm_(optimizer, max_norm)
        optimizer.step()
        optimizer.zero_grad()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(param) for name, param in model.named_parameters()}


def twin(micro: int, max_norm: float | None = None) -> dict[str, Tensor]:
    reference = Twin(CASE, sgd, ranks=dist.get_world_size(), zero_unused=False, max_norm=max_norm)
    for step in range(STEPS):
        reference.step([CASE.make_batch(10 * step + number, reference.ranks) for number in range(micro)])
    return reference.parameters()


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=4)
def test_copies_across_nodes_train_as_the_twin(stage: int) -> None:
    # Sums over four ranks in another order: a few roundings of fp32 in each of three steps.
    for micro, max_norm in ((1, None), (3, None), (2, 0.1)):
        model, optimizer, owner = build(nodes(), stage)
        train(model, optimizer, micro, max_norm)
        assert owner.axis == "dp_shard"
        assert owner.units[0].layout.world == 2
        found = parameters(model)
        assert_close_norm(found, twin(micro, max_norm), 1e-6)
        same = [value.clone() for value in found.values()]
        for value in same:
            dist.broadcast(value, 0)
        assert all(torch.equal(a, b) for a, b in zip(same, found.values(), strict=True))  # no node drifts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_copies_that_nothing_cuts_train_as_the_twin(stage: int) -> None:
    """Each rank is a node: all of everything is on it, and gradients cross once in a step."""
    for micro, max_norm in ((1, None), (3, None), (2, 0.1)):
        mesh = Topology(dp_replicate=2, dp_shard=1).build()
        if stage == 0:
            model = CASE.build()
            owner: FlatOwner = ReplicatedOwner(model, mesh, bucket_numel=1)
            optimizer = ShardedOptimizer(sgd(model), owner)
        else:
            model, optimizer, owner = build(mesh, stage)
        train(model, optimizer, micro, max_norm)
        assert "replicas" in owner.features
        assert all(unit.layout.shard_numel == unit.layout.numel for unit in owner.units)
        assert_close_norm(parameters(model), twin(micro, max_norm), 1e-6)
        mesh.log.clear()
        backward(model, 1, micro)
        optimizer.step()
        log = mesh.log.sent_bytes
        psi = sum(4 * unit.layout.numel for unit in owner.units)
        assert not any(axis == "dp_shard" for axis, _ in log)
        if stage > 0:  # at stage 0 what ranks agree on travels along the same axis
            assert log["dp_replicate", "all_reduce"] == psi  # 2 * (N - 1) / N of it, N = 2
        assert psi <= log["dp_replicate", "all_reduce"] < 2 * psi


@distributed(world_size=4)
def test_a_second_shard_changes_no_bit() -> None:
    for micro, dtype in ((1, None), (2, None), (2, "bfloat16")):
        plain, optimizer, _ = build(Topology().build(), 3, dtype=dtype)
        train(plain, optimizer, micro)
        model, optimizer, owner = build(nodes(), 3, dtype=dtype, secondary_shard=True)
        train(model, optimizer, micro)
        assert owner.axis == "data"
        assert owner.units[0].layout.world == 4
        expected = parameters(plain)
        assert all(torch.equal(value, expected[name]) for name, value in parameters(model).items())


@distributed(world_size=4)
def test_bytes_by_axis_equal_the_formulas() -> None:
    micro, ranks, each, mlp = 3, 4, 2, CASES["mlp"]
    for second in (False, True):
        mesh = nodes()
        model, optimizer, owner = build(mesh, 3, mlp, secondary_shard=second, prefetch_numel=0)
        backward(model, 0, micro, mlp)
        optimizer.step()
        optimizer.zero_grad()
        mesh.log.clear()
        backward(model, 1, micro, mlp)
        optimizer.step()
        log = mesh.log.sent_bytes
        psi = sum(4 * unit.layout.numel for unit in owner.units)
        uses = 2 * micro  # each unit in one forward and one backward of every micro batch
        inside, across = psi * (each - 1) // each, psi * (ranks - 1) // ranks
        if second:
            assert log["data", "all_gather"] == across
            assert log["dp_shard", "all_gather"] == (uses - 1) * inside
            assert log["data", "reduce_scatter"] == micro * across
            assert ("dp_replicate", "all_reduce") not in log
        else:
            assert log["dp_shard", "all_gather"] == uses * inside
            assert log["dp_shard", "reduce_scatter"] == micro * inside
            assert log["dp_replicate", "all_reduce"] == psi // each  # 2 * (R - 1) / R of the shard, R = 2
            assert ("data", "all_gather") not in log


@distributed(world_size=4)
def test_a_look_between_micro_batches_does_not_count_twice() -> None:
    """`full_grad` sums over nodes; what comes after it is added to a mean."""
    model, optimizer, _ = build(nodes(), 2)
    backward(model, 0, 1)
    first = {name: full_grad(param) for name, param in model.named_parameters()}
    backward(model, 1, 1)
    second = {name: full_grad(param) for name, param in model.named_parameters()}
    reference = CASE.build()
    for seed, seen in ((0, first), (1, second)):
        for rank in range(4):
            (torch.stack(CASE.losses(reference, CASE.rank_batch(seed, rank, 4))).sum() / 4).backward()
        grads = {name: param.grad for name, param in reference.named_parameters()}
        assert_close_norm(
            {name: value for name, value in seen.items() if value is not None},
            {name: value for name, value in grads.items() if value is not None},
            1e-6,
        )
    optimizer.zero_grad()


@distributed(world_size=4)
def test_a_checkpoint_moves_between_layouts(tmp_path: str) -> None:
    store = CheckpointStore(tmp_path)
    model, optimizer, owner = build(nodes(), 3)
    train(model, optimizer, 1)
    store.save(1, {"model": owner, "optimizer": optimizer})
    expected = parameters(model)
    copies = Topology(dp_replicate=4).build()
    layouts = ((Topology().build(), {}), (nodes(), {"secondary_shard": True}), (nodes(), {}), (copies, {}))
    for mesh, settings in layouts:
        again, other, target = build(mesh, 3, **settings)
        store.load({"model": target, "optimizer": other})
        assert all(torch.equal(value, expected[name]) for name, value in parameters(again).items())
        train(again, other, 1)
        reference, plain, _ = build(nodes(), 3)
        store.load({"model": plain.owner, "optimizer": plain})
        train(reference, plain, 1)
        assert_close_norm(parameters(again), parameters(reference), 1e-6)


@distributed(world_size=4)
def test_writes_of_one_rank_reach_every_node(rank: int) -> None:
    for settings in ({}, {"secondary_shard": True}):
        model, _, _ = build(nodes(), 3, **settings)
        param = next(model.parameters())
        with gather(param, write=3):
            if rank == 3:
                param.data.fill_(7.0)
        assert bool((full_tensor(param) == 7.0).all())


@distributed(world_size=2)
def test_a_second_shard_needs_nodes() -> None:
    model = copy.deepcopy(CASE.build())
    with pytest.raises(ValueError, match=r"secondary_shard.*needs stage 3, got 3.*got 1 x 2"):
        Zero(stage=3, secondary_shard=True).shard(model, Topology().build())
    with pytest.raises(ValueError, match="got 2"):
        Zero(stage=2, secondary_shard=True).shard(model, Topology().build())
