"""A trace is valid JSON in which our ranges are there and lie inside one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_core import Engine, ReplicatedOwner, ShardedOptimizer, trace
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, Batch

CASE = CASES["mlp"]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return CASE.losses(model, batch)[0]


def ranges(path: Path) -> list[dict[str, Any]]:
    """Our ranges, after checking that no two of a thread overlap without one holding the other."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X"]
    for one in found:
        for other in found:
            if one is not other and one["tid"] == other["tid"] and one["ts"] <= other["ts"]:
                begins_inside = other["ts"] < one["ts"] + one["dur"]
                assert not begins_inside or inside(other, one), (one, other)
    return found


def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    slack = 0.002  # microseconds: the file rounds to nanoseconds
    ends = inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack
    return bool(outer["ts"] - slack <= inner["ts"] and ends)


def named(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in found if event["name"] == name]


@distributed(world_size=2)
def test_an_engines_step_on_two_ranks(rank: int, tmp_path: Path) -> None:
    model = CASE.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    owner = ReplicatedOwner(model, bucket_numel=64)
    engine = Engine(model, owner, ShardedOptimizer(optimizer, owner), accumulate=2)
    batches = [CASE.rank_batch(seed, rank, 2) for seed in range(2)]
    engine.train_batch(batches, loss_fn)
    with trace(tmp_path / "step.json", engine) as tracing:
        engine.train_batch(batches, loss_fn)
    assert tracing.path == tmp_path / f"step-rank{rank}.json"
    found = ranges(tracing.path)
    assert [len(named(found, name)) for name in ("forward", "backward", "step")] == [2, 2, 2]
    for name in ("inp", "blocks.0", "blocks.2", "head"):
        blocks = named(found, f"forward {name}")
        assert [inside(b, f) for b, f in zip(blocks, named(found, "forward"), strict=True)] == [True, True]
    reduces = [event for event in found if event["name"].startswith("reduce")]
    assert len(reduces) >= len(owner.trainable)
    for unit in owner.trainable:  # the range has the unit's name
        assert any(event["name"].startswith(f"reduce {unit.key}") for event in reduces)
    last = [*named(found, "backward"), *named(found, "step")]
    assert all(any(inside(event, phase) for phase in last) for event in reduces)
    waits = [event for event in found if event["name"].startswith("wait reduce")]
    assert len(waits) >= len(owner.trainable)
    messages = [e for e in json.loads(tracing.path.read_text())["traceEvents"] if e.get("cat") == "in flight"]
    assert len({event["id"] for event in messages}) * 2 == len(messages) > 0
    operators = [e for e in json.loads(tracing.path.read_text())["traceEvents"] if e.get("cat") == "cpu_op"]
    products = [event for event in operators if event["name"] == "aten::addmm"]
    assert sum(inside(event, named(found, "forward")[0]) for event in products) == 2 + 2 * 3


def test_a_plain_loop_names_its_own_ranges(tmp_path: Path) -> None:
    model = CASE.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "new" / "step.json"
    with trace(path, model, optimizer) as tracing:
        loss = loss_fn(model, CASE.make_batch(0, 1))
        with tracing.range("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = ranges(path)
    assert [len(named(found, name)) for name in ("forward", "backward", "step")] == [1, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]


def test_a_block_that_raises_still_leaves_a_trace_and_nothing_else(tmp_path: Path) -> None:
    model = CASE.build()
    try:
        with trace(tmp_path / "step.json", model):
            model(torch.randn(2, 6))
            raise KeyError("x")
    except KeyError:
        assert named(ranges(tmp_path / "step.json"), "forward")
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with trace(tmp_path / "bare.json"):  # the profiler alone
        model(torch.randn(2, 6))
    assert not ranges(tmp_path / "bare.json")
