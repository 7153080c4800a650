"""Checkpointed blocks of a sharded model: gradients of the twin, no gather more, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_core import checkpoint_blocks
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_zero import Zero, compile_blocks, full_grad

CASE = CASES["mlp"]


def twin_grads() -> dict[str, Tensor]:
    twin = Twin(CASE, lambda model: torch.optim.SGD(model.parameters(), lr=0.0), ranks=2)
    return twin.step([CASE.make_batch(0, 2)]).grads


@pytest.mark.parametrize("compiled", [False, True])
@distributed(world_size=2)
def test_a_checkpointed_unit_is_gathered_once_each_way(compiled: bool, rank: int) -> None:
    """The recomputation finds the block's parameters where its backward needs them anyway."""
    expected = twin_grads()
    for stage in (1, 3):
        gathers = []
        for recompute in (False, True):
            model = CASE.build()
            owner = Zero(stage=stage, bucket_numel=1, keep_numel=0).shard(model)
            if compiled:
                compile_blocks(model, backend="aot_eager")
            if recompute:
                checkpoint_blocks(model)
            for _ in range(2):
                owner.zero_grad()
                owner.mesh.log.clear()
                CASE.losses(model, CASE.rank_batch(0, rank, 2))[0].backward()
            gathers.append(owner.mesh.log.calls["dp_shard", "all_gather"])
            found = {name: full_grad(p) for name, p in model.named_parameters()}
            assert_close_norm({n: g for n, g in found.items() if g is not None}, expected, 1e-5)
        assert gathers[0] == gathers[1]
        assert (gathers[0] > 0) == (stage == 3)
