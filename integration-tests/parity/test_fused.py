"""ds-kernels' AdamW over shards: what it does in one pass gives the bits of doing it one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core import Engine, ShardedOptimizer
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import run_ranks
from ds_kernels import FusedAdamW
from ds_zero import Zero


class Bare(FusedAdamW):
    """The same arithmetic, offering nothing: gradients are cast and scaled before it, parameters after it."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        del self.copy_out, self.low_precision_grads

    clip_coef = None  # type: ignore[assignment]
    copy_out = None  # type: ignore[assignment]
    low_precision_grads = None  # type: ignore[assignment]

    def _grad_coef(self) -> None:
        return None


def train(kind: Any, stage: int, grad_dtype: str | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
    owner = Zero(stage=stage, dtype="bfloat16", grad_dtype=grad_dtype).shard(model, Topology().build())
    sharded = ShardedOptimizer(optimizer, owner)
    assert len(sharded._copied) == (0 if kind is Bare else sum(unit.trainable for unit in owner.units))
    # Scaled in bf16, gradients would be rounded once more than in the pass.
    engine = Engine(model, owner, sharded, max_norm=0.05 if grad_dtype is None else None)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        engine.backward(model(torch.randn(4, 7, generator=generator).bfloat16()).float().square().mean())
        report = engine.step()
        assert report is not None
        assert (report.clip_coef < 1.0) == (grad_dtype is None)
    with owner.whole(owner.units):
        found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for number, piece in enumerate(sharded.pieces):
        state = {"master": piece.param.detach(), **optimizer.state[piece.param]}
        found |= {f"piece {number} {name}": value.clone() for name, value in state.items()}
    return found


def both(stage: int, grad_dtype: str | None) -> None:
    fused, bare = (train(kind, stage, grad_dtype) for kind in (FusedAdamW, Bare))
    assert fused.keys() == bare.keys()
    for name, value in fused.items():
        assert torch.equal(value, bare[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("grad_dtype", [None, "bfloat16"])
def test_one_pass_is_several(stage: int, grad_dtype: str | None) -> None:
    run_ranks(both, 2, timeout=60.0, stage=stage, grad_dtype=grad_dtype)
