"""A twin steps chunks: options and hooks are those of one step, whatever the number of chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ds_core import JointOptimizer, ReplicatedOwner, ShardedOptimizer
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore
from ds_offload.twin import Scaling, Twin


def model_of(numel: int = 12_000) -> nn.Linear:
    return nn.Linear(numel, 1)


def step(model: nn.Linear, optimizer: Optimizer, times: int = 1) -> None:
    for _ in range(times):
        model(torch.ones(1, model.in_features)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def offloaded(
    make: Callable[[Any], Optimizer], folder: Path
) -> tuple[nn.Linear, Optimizer, ShardedOptimizer]:
    model = model_of()
    optimizer = make(model.parameters())
    store = TieredStore(nvme=str(folder), masters="nvme", moments="nvme", grads="nvme", chunk_numel=4096)
    return model, optimizer, ShardedOptimizer(optimizer, ReplicatedOwner(model, store=store))


def test_each_chunk_starts_from_what_the_step_found_and_leaves_no_trace() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.1)
    optimizer.count = 7  # type: ignore[attr-defined]
    before = [dict(group) for group in optimizer.param_groups]
    seen: list[list[Any]] = []

    def spying(self: Any) -> None:
        seen.append([self.count, *((len(group["params"]), group["lr"]) for group in self.param_groups)])
        self.count += 1
        for group in self.param_groups:
            group["lr"] *= 2
            group["new"] = 1

    piece = type("Piece", (), {"param": params[1]})()
    shown = nn.Parameter(torch.ones(2))
    twin = Twin(optimizer, Scaling(None, None))
    twin._inner = spying
    twin.step([(piece, shown)])
    twin.step([])
    assert seen == [[7, (1, 0.5), (0, 0.1)], [7, (0, 0.5), (0, 0.1)]]
    assert optimizer.count == 7  # type: ignore[attr-defined]
    for group, options in zip(optimizer.param_groups, before, strict=True):
        assert {**group, "params": list(map(id, group["params"]))} == {
            **options,
            "params": list(map(id, options["params"])),
        }


def test_an_error_stays_in_the_twin() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(params, lr=0.1)

    def broken(self: Any) -> None:
        assert self.param_groups[0]["params"] == []
        self.state[params[0]] = {"half": 1}
        raise ZeroDivisionError

    twin = Twin(optimizer, Scaling(None, None))
    twin._inner = broken
    with pytest.raises(ZeroDivisionError):
        twin.step([])
    assert optimizer.param_groups[0]["params"][0] is params[0]
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("joined", [False, True])
def test_hooks_run_once_in_a_step(joined: bool, tmp_path: Path) -> None:
    def make(params: Any) -> Optimizer:
        made = torch.optim.AdamW(params)
        return JointOptimizer([made]) if joined else made

    model, optimizer, sharded = offloaded(make, tmp_path)
    calls: list[str] = []
    for each in (optimizer, *getattr(optimizer, "optimizers", ())):
        each.register_step_pre_hook(lambda *_: calls.append("before"))
        each.register_step_post_hook(lambda *_: calls.append("after"))
    step(model, optimizer)
    assert sharded.elsewhere is not None
    assert len(sharded.elsewhere.plan.chunks) > 2  # type: ignore[attr-defined]
    assert calls == ["before", *(["before", "after"] if joined else []), "after"]


def test_a_seed_counts_steps_and_not_chunks(tmp_path: Path) -> None:
    def make(params: Any) -> Optimizer:
        made = FusedAdamW(params)
        made.seed = 5
        return made

    model, optimizer, _ = offloaded(make, tmp_path)
    step(model, optimizer, 3)
    assert optimizer.seed == 8  # type: ignore[attr-defined]
