"""Predicted bytes are those of the live storages, on two ranks, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import Engine, ReplicatedOwner, ShardedOptimizer
from ds_core.ground.ticket import Ticket
from ds_core.setup.predict import Settings, predict
from ds_core.setup.search import wire_bytes
from ds_core.setup.shape import Shape
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.train.memory import live_memory
from ds_zero import Zero

CASE = CASES["tied"]
BUDGETS = {"bucket_numel": 100, "prefetch_numel": 700, "keep_numel": 600}


def build(stage: int, dtype: str | None, **settings: Any) -> Engine:
    model = CASE.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    owner: FlatOwner
    if stage == 0:
        owner = ReplicatedOwner(model, dtype=dtype, bucket_numel=settings["bucket_numel"])
    else:
        owner = Zero(stage=stage, dtype=dtype, **settings).shard(model)
    return Engine(model, owner, ShardedOptimizer(optimizer, owner))


def loss_of(engine: Engine, seed: int, rank: int) -> Tensor:
    return CASE.losses(engine.model, CASE.rank_batch(seed, rank, 2))[0]


def test_the_defaults_are_those_of_zero() -> None:
    settings = Settings()
    for name in ("bucket_numel", "prefetch_numel", "keep_numel", "persist_numel"):
        assert getattr(settings, name) == Zero.model_fields[name].default


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("stage", "persist"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 200)])
@distributed(world_size=2)
def test_states_are_exact(rank: int, stage: int, dtype: str, persist: int) -> None:
    shape = Shape.of(CASE.build(), bucket_numel=100)
    settings = Settings(ranks=2, stage=stage, dtype=dtype, persist_numel=persist, **BUDGETS)  # type: ignore
    engine = build(stage, None if dtype == "float32" else dtype, persist_numel=persist, **BUDGETS)
    engine.backward(loss_of(engine, 0, rank))
    engine.step()
    engine.backward(loss_of(engine, 1, rank))
    engine.owner.drain()
    found, predicted = live_memory(engine.owner, engine.optimizer), predict(shape, settings, rank=rank)
    assert found.params == predicted.params
    assert found.grads == predicted.grads
    scalars = 4 * sum(
        1 for state in engine.optimizer.optimizer.state.values() for t in state.values() if t.dim() == 0
    )
    assert found.optimizer - scalars == predicted.optimizer
    assert (found.buckets, found.gathered) == (0, 0)  # nothing is under way between steps


class Watching:
    """Passes reductions on and notes how many bytes are under way at the worst moment."""

    def __init__(self, engine: Engine) -> None:
        self.reducer, self.inner, self.most = engine.owner.reducer, engine.owner.reducer._wire._comm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reduce_scatter(self, out: Tensor, full: Tensor, **options: Any) -> Ticket:
        ticket = self.inner.reduce_scatter(out, full, **options)
        flying = [ticket for _, ticket in self.reducer._in_flight]
        kept = [t for each in (*flying, ticket) for t in each._keepalive]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        self.most = max(self.most, sum(storages.values()))
        return ticket


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2])
@distributed(world_size=2)
def test_buckets_on_their_way_are_exact(rank: int, stage: int, dtype: str) -> None:
    shape = Shape.of(CASE.build(), bucket_numel=100)
    settings = Settings(ranks=2, stage=stage, dtype=dtype, **BUDGETS)  # type: ignore[arg-type]
    engine = build(stage, None if dtype == "float32" else dtype, **BUDGETS)
    engine.owner.reducer._wire._comm = watching = Watching(engine)  # type: ignore[assignment]
    for seed in range(2):
        engine.backward(loss_of(engine, seed, rank))
        engine.step()
    predicted = predict(shape, settings).buckets
    assert watching.most == predicted, (watching.most, predicted)


@distributed(world_size=2)
def test_gathered_units_stay_below_the_prediction(rank: int) -> None:
    for prefetch, keep in [(0, 0), (1, 0), (300, 0), (1000, 300), (0, 10**6), (10**6, 10**6)]:
        most, predicted, largest = gathered(prefetch, keep, rank)
        assert predicted - largest <= most <= predicted, (prefetch, keep, most, predicted)


def gathered(prefetch: int, keep: int, rank: int) -> tuple[int, int, int]:
    """Bytes of whole units at the worst moment, what was predicted, and bytes of the largest unit."""
    budgets = {"bucket_numel": 1, "prefetch_numel": prefetch, "keep_numel": keep}
    shape = Shape.of(CASE.build(), bucket_numel=1)
    predicted = predict(shape, Settings(ranks=2, stage=3, dtype="float32", **budgets)).gathered  # type: ignore
    engine = build(3, None, **budgets)
    most = [0]
    make, whole = type(engine.owner.units[0]).make_room, engine.owner.units

    def note(unit: Any) -> Tensor:
        made = make(unit)
        most.append(sum(each.whole.untyped_storage().nbytes() for each in whole))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole[0]), "make_room", note)
        for seed in range(3):
            engine.backward(loss_of(engine, seed, rank))
            engine.step()
    return max(most), predicted, 4 * max(unit.layout.numel for unit in whole)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_bytes_of_the_model_on_the_wire_are_exact(rank: int, stage: int, accumulate: int) -> None:
    shape = Shape.of(CASE.build(), bucket_numel=100)
    engine = build(stage, None, **BUDGETS)
    engine.accumulate = accumulate
    log, steps = engine.owner.mesh.log, []
    clear = log.clear

    def note() -> None:
        steps.append(log.sent_bytes["dp_shard", "all_gather"] + log.sent_bytes["dp_shard", "reduce_scatter"])
        clear()

    log.clear = note  # type: ignore[method-assign]
    for seed in range(3 * accumulate):
        engine.backward(loss_of(engine, seed, rank))
        engine.step()
    settings = Settings(ranks=2, stage=stage, dtype="float32", accumulate=accumulate, **BUDGETS)  # type: ignore
    assert steps[-1] == wire_bytes(shape, settings), (steps, wire_bytes(shape, settings))


def test_an_unknown_module_has_no_activations() -> None:
    model = nn.Linear(10, 10)
    assert predict(Shape.of(model), Settings(seq=5)).activations == 0
