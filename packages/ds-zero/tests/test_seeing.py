"""Profiles of sharded models say what they say of plain ones, and traces name the units."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ds_core import Engine, ShardedOptimizer, Timeline, Topology, profile_model, trace
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_zero import Zero


@distributed(world_size=2)
def test_flops_of_a_sharded_model_are_those_of_the_plain_one(rank: int) -> None:
    for case in ("mlp", "tied", "twice", "frozen", "checkpoint_reentrant", "checkpoint_non_reentrant"):
        batch = CASES[case].rank_batch(0, rank, 2)
        x = batch["tokens"][:, :-1] if "tokens" in batch else batch["x"]
        plain = profile_model(CASES[case].build(), x)
        for stage in (1, 2, 3):
            model = CASES[case].build()
            config = Zero(stage=stage, bucket_numel=64, persist_numel=0)  # type: ignore[arg-type]
            owner = config.shard(model)
            for _ in range(2):  # in the second pass units are fetched ahead in the order of the first
                report = profile_model(model, x)
                for mine, other in zip(report.modules, plain.modules, strict=True):
                    assert (mine.params, mine.runs) == (other.params, other.runs)
                    for phase in ("forward", "backward", "recompute"):
                        a, b = getattr(mine, phase), getattr(other, phase)
                        where = (case, stage, mine.name, phase)
                        assert (a.flops, a.elementwise) == (b.flops, b.elementwise), where
            del owner


@distributed(world_size=2)
def test_a_trace_at_stage_3_names_the_gathers_and_reductions_of_units(rank: int, tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    owner = Zero(stage=3, bucket_numel=64, persist_numel=0, overlap=False).shard(model)
    engine = Engine(model, owner, ShardedOptimizer(optimizer, owner))

    def step(seed: int) -> None:
        engine.train_batch(
            [case.rank_batch(seed, rank, 2)], lambda model, batch: case.losses(model, batch)[0]
        )

    step(0)
    with trace(tmp_path / "step.json", engine) as tracing, Timeline(engine) as timeline:
        step(1)
    events = [
        event
        for event in json.loads(tracing.path.read_text())["traceEvents"]
        if event.get("cat") == "user_annotation"
    ]
    for unit in owner.units:
        assert unit.key in {fqn for fqn, _ in model.named_parameters()}
        of_unit = [event for event in events if unit.key in event["name"]]
        for phase, least in (("gather", 1), ("wait gather", 1), ("reduce", 1), ("wait reduce", 1)):
            assert sum(event["name"].startswith(phase + " ") for event in of_unit) >= least, (unit.key, phase)
    block = next(event for event in events if event["name"] == "forward blocks.1")
    fetched = [e for e in events if e["name"].startswith("gather blocks.1") and _inside(e, block)]
    assert len(fetched) == 1  # without overlap a block's gather is part of its forward
    assert timeline.steps[0].wait > 0
    step(2)  # nothing is left that would fail


@distributed(world_size=4)
def test_waits_of_every_group_of_a_hybrid_mesh_are_seen(rank: int, tmp_path: Path) -> None:
    case = CASES["mlp"]
    mesh = Topology(dp_replicate=2, dp_shard=2).build()
    for secondary in (True, False):
        model = case.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = Zero(
            stage=3,
            bucket_numel=64,
            persist_numel=0,
            prefetch_numel=0,
            keep_numel=0,
            secondary_shard=secondary,
        )
        owner = config.shard(model, mesh)
        engine = Engine(model, owner, ShardedOptimizer(optimizer, owner))
        with trace(tmp_path / "step.json", engine) as tracing:
            batch = case.rank_batch(0, rank, 4)
            engine.train_batch([batch], lambda model, batch: case.losses(model, batch)[0])
        events = json.loads(tracing.path.read_text())["traceEvents"]
        waits = [event for event in events if event.get("name", "").startswith("wait gather blocks.1")]
        backward = next(event for event in events if event.get("name") == "backward")
        assert sum(_inside(event, backward) for event in waits) == 1
        reduces = [e for e in events if e.get("name", "").startswith("reduce blocks.1")]
        assert len(reduces) == (1 if secondary else 2)  # inside the node, and across


def _inside(inner: dict[str, float], outer: dict[str, float]) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.002
