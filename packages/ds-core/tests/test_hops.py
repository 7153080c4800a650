"""Node boundaries along an axis: where they come from, and the communicators on either side of them."""

from __future__ import annotations

import pytest
import torch

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.collectives import LocalCommunicator
from ds_core.ground.mesh import Mesh, Topology
from ds_core.testing.distributed import distributed, run_ranks

CPU = Accelerator(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_RANKS_PER_NODE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def mesh(world: int, **degrees: int) -> Mesh:
    return Mesh(CPU, Topology(**degrees).degrees(world))


def test_where_the_size_of_a_node_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = mesh(8, dp_replicate=2)
    assert mesh(8).node_size("dp_shard") == 8  # nobody says otherwise: all on one node
    assert hybrid.node_size("data") == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert mesh(8).node_size("dp_shard") == 2
    assert mesh(8).node_size("data") == 2
    assert hybrid.node_size("data") == 4
    assert hybrid.node_size("dp_replicate") == 1
    assert mesh(8, tp=2).node_size("dp_shard") == 1  # both ranks of a node are one rank's of this axis
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh(8, tp=2).node_size("dp_shard") == 2
    assert hybrid.node_size("dp_shard") == 4
    monkeypatch.setenv("DS_RANKS_PER_NODE", "2")
    assert hybrid.node_size("data") == 2
    assert mesh(8).node_size("dp_shard", 8) == 8


def test_an_axis_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"node_size=3 does not divide the 8 ranks .* give one of 1, 2, 4, 8"
    ):
        mesh(8).node_size("dp_shard", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"nodes \[0, 0, 0, 1, 1, 1, 2, 2\], as LOCAL_WORLD_SIZE=3"):
        mesh(8).node_size("dp_shard")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE='many' must be the number of ranks"):
        mesh(8).node_size("dp_shard")
    monkeypatch.setenv("DS_RANKS_PER_NODE", "6")
    with pytest.raises(ValueError, match="DS_RANKS_PER_NODE=6"):
        mesh(8).node_size("dp_shard")


@distributed(world_size=4)
def test_a_chunk_takes_two_hops(rank: int) -> None:
    made = mesh(4)
    inner, outer = made.hops("dp_shard", "reduce", node_size=2)
    assert (inner.rank, inner.world, outer.rank, outer.world) == (rank % 2, 2, rank // 2, 2)
    assert made.hops("dp_shard", "reduce", node_size=2) == (inner, outer)
    found = torch.empty(2, dtype=torch.int64)
    inner.all_gather(found, torch.tensor([rank])).wait()
    assert found.tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]
    outer.all_gather(found, torch.tensor([rank])).wait()
    assert found.tolist() == [rank % 2, rank % 2 + 2]
    assert made.log.bytes_by_axis() == {"dp_shard/node": 8, "dp_shard/across": 8}
    whole, alone = made.hops("dp_shard", "reduce", node_size=4)
    assert whole.world == 4
    assert isinstance(alone, LocalCommunicator)
    alone, whole = made.hops("dp_shard", "reduce", node_size=1)
    assert whole.world == 4
    assert isinstance(alone, LocalCommunicator)


def hybrid(rank: int) -> list[int]:
    inner, outer = Topology(dp_replicate=2, dp_shard=2).build(CPU).hops("data")
    return [inner.rank, inner.world, outer.rank, outer.world]


def test_nodes_of_a_hybrid_mesh() -> None:
    assert run_ranks(hybrid, 4) == [[rank % 2, 2, rank // 2, 2] for rank in range(4)]
