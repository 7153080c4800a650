"""The device's share begins before the host's, once, with the bits that the optimizer's own step gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.clip import clip_grad_norm_
from ds_core.train.optim import ShardedOptimizer
from ds_kernels import FusedAdamW
from ds_offload import TieredStore

HALF = "0.5 device / 0.5 nvme"


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def fused(params: Any) -> torch.optim.Optimizer:
    made = FusedAdamW(params, lr=1e-2)
    made.seed = 3  # an option that each step changes once
    return made


class Noting(torch.optim.SGD):
    """Remembers the memory of what each of its steps updated."""

    elementwise = True
    seen: list[list[int]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.seen.append([p.data_ptr() for g in groups for p in g["params"] if p.grad is not None])
        return super().step(closure)


def train(make: Any, store: TieredStore | None, dtype: torch.dtype | None) -> tuple[list[torch.Tensor], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(6)))
    optimizer = make(model.parameters())
    owner = ReplicatedOwner(model, dtype=dtype, store=store, bucket_numel=100)
    ShardedOptimizer(optimizer, owner)
    for step in range(4):
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(step)).to(dtype or torch.float32)
        model(x).float().square().mean().backward()
        clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    found = [unit.values().detach().clone() for unit in owner.trainable]
    found += [param.detach().clone() for param in model.parameters()]
    return found, optimizer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [adamw, fused])
def test_the_bits_are_those_of_one_step(make: Any, dtype: torch.dtype | None, tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), masters=HALF, moments=HALF, grads=HALF)
    (plain, one), (half, two) = train(make, None, dtype), train(make, store, dtype)
    held = store.bytes_by_tier()
    assert held["device"] > 0
    assert held["nvme"] > 0
    assert all(map(torch.equal, plain, half))
    assert getattr(one, "seed", None) == getattr(two, "seed", None)
    states = [
        [two.state[p] for group in two.param_groups for p in group["params"]],
        [one.state[p] for group in one.param_groups for p in group["params"]],
    ]
    for mine, theirs in zip(*states, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    store.close()


def test_the_device_comes_first_and_nothing_is_stepped_twice(tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), masters=HALF, moments=HALF, grads=HALF)
    Noting.seen = []
    _, optimizer = train(lambda params: Noting(params, lr=0.1), store, None)
    owned = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    chunks = len(Noting.seen) // 4
    for step in range(4):
        first, *rest = Noting.seen[step * chunks : (step + 1) * chunks]
        assert first, "the device had no share"
        assert set(first) <= owned
        assert len(rest) > 2
        assert rest[-1] == []  # the optimizer's own step passes everything over
        assert not set(first) & {address for seen in rest for address in seen}
    store.close()
