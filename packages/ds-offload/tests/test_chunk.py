"""One chunk: what a fetch that fails leaves, and a low precision shard beside a master."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_core import ReplicatedOwner, ShardedOptimizer
from ds_kernels.aio import AioError
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore
from ds_offload.buffers import Turns
from ds_offload.chunk import ChunkUpdate
from ds_offload.plan import Chunk
from ds_offload.states import UnitStates
from ds_offload.twin import Scaling, Twin
from ds_offload.work import Work


def setup(
    folder: Path, found_inf: torch.Tensor | None = None
) -> tuple[TieredStore, ShardedOptimizer, Work, ChunkUpdate]:
    model = nn.Linear(128, 64)  # no padding behind it
    store = TieredStore(nvme=str(folder), masters="nvme", moments="nvme", grads="nvme")
    owner = ReplicatedOwner(model, store=store, dtype="bfloat16")
    sharded = ShardedOptimizer(FusedAdamW(model.parameters(), lr=0.1), owner)
    model(torch.ones(2, 128, dtype=torch.bfloat16)).float().square().mean().backward()
    owner.drain()
    if found_inf is not None:
        sharded.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    states = UnitStates(store, sharded)
    twin = Twin(sharded.optimizer, Scaling(None, None))
    return store, sharded, states.work(owner.units[0], sharded.pieces), ChunkUpdate(store, states, twin)


def test_a_fetch_that_fails_waits_for_what_it_has_started(tmp_path: Path) -> None:
    """Its buffers are used again: a read that came late would write over what is there by then."""
    store, sharded, work, chunks = setup(tmp_path)
    unit, turn, slow = sharded.owner.units[0], Turns(1, pinned=False)[0], Future[int]()
    home, original = store.home_of(f"{unit.key}/grad"), store.volume.read  # type: ignore[union-attr]
    assert home is not None
    failed: Future[int] = Future()
    failed.set_exception(AioError(5, "planted", path="p", offset=0, wanted=1, got=0))
    home.pending.append(failed)
    waited: list[bool] = []

    class Late(Future[int]):
        def exception(self, timeout: float | None = None) -> Any:
            waited.append(True)
            return None

    store.volume.read = lambda offset, tensor: Late()  # type: ignore[union-attr,method-assign,assignment,return-value]
    with pytest.raises(AioError, match="planted"):
        chunks.fetch(Chunk(0, 0, 1000), work, turn)
    assert waited == [True]  # the master's read
    store.volume.read = original  # type: ignore[union-attr,method-assign]
    assert not slow.done()
    store.close()


@pytest.mark.parametrize("overflow", [False, True])
def test_the_low_precision_shard_is_the_master_rounded(overflow: bool, tmp_path: Path) -> None:
    """By the optimizer in its own pass, or, when that changes nothing, from the master that was there."""
    store, sharded, work, chunks = setup(tmp_path, torch.tensor(1.0) if overflow else None)
    unit, turns, optimizer = sharded.owner.units[0], Turns(1, pinned=False), sharded.optimizer
    before = unit.values().detach().clone()
    now = chunks.fetch(Chunk(0, 0, unit.layout.shard_numel), work, turns[0])
    now.out = torch.full_like(now.out, float("nan"))  # type: ignore[arg-type]
    with torch.no_grad():
        chunks.update(now)
    assert now.out is not None
    assert torch.equal(now.master, before) == overflow
    numel = sum(piece.param.numel() for piece in sharded.pieces)
    assert numel == unit.layout.shard_numel  # so that the optimizer may write all of it
    assert torch.equal(now.out[:numel], now.master[:numel].to(torch.bfloat16))
    assert optimizer.state == {} or set(optimizer.state) <= {piece.param for piece in sharded.pieces}
    assert optimizer.copy_out == {} or len(optimizer.copy_out) == len(sharded.pieces)  # type: ignore[attr-defined]
    chunks.flush(now)
    turns.empty()
    store.settle()
    assert torch.equal(unit.values(), now.master)
    store.close()
