"""Every yes of ds_core/limits.py: each feature, and each pair of them, trained at each stage on two ranks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_core import JointOptimizer, ReplicatedOwner, ShardedOptimizer, Topology
from ds_core.ground.codec import CastCodec
from ds_core.ground.mesh import Mesh
from ds_core.limits import ACROSS_NODES, STAGES, combos, tests
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES, TinyLM
from ds_core.testing.parity import assert_close_norm
from ds_zero import EMA, Zero, full_grad, full_tensor, no_sync

CASE = CASES["tied"]
ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DECAY = 0.75
STEPS = 2
# Unit roundoff of what gradients are rounded to on the wire. A gradient is rounded once there, and at stage
# 0 once more in the one addition that two ranks need (across replicas, too); its parts come from autograd
# rounded on both sides.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = 2


class Checkpointed(TinyLM):
    """A decoder whose blocks are recomputed, each in its own way."""

    def __init__(self, ways: list[bool | None], *, tied: bool) -> None:
        super().__init__(tied=tied)
        self.ways = ways  # re-entrant or not, or None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block, way in zip(self.blocks, self.ways, strict=True):
            x = block(x) if way is None else checkpoint(block, x, use_reentrant=way)
        return self.head(self.norm(x)) * self.scale  # type: ignore[no-any-return]


class NeedsMatrices(torch.optim.SGD):
    """Says that it must see whole parameters."""

    elementwise = False


def build(features: frozenset[str]) -> nn.Module:
    """The model of these features, the same on every call."""
    ways: list[bool | None] = [None, None]
    if "reentrant" in features:
        ways = [True, True]
    if "non-reentrant" in features:
        ways[1] = False
        ways[0] = "reentrant" in features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Checkpointed(ways, tied="tied" in features)
    if "frozen" in features:
        model.blocks[0].requires_grad_(False)
        model.norm.bias.requires_grad_(False)
    return model


def sgd(model: nn.Module, features: frozenset[str]) -> torch.optim.Optimizer:
    kind = NeedsMatrices if "whole cut" in features else torch.optim.SGD
    params = [p for p in model.parameters() if p.requires_grad]
    if "several optimizers" in features:
        return JointOptimizer([kind(params[part::2], lr=0.1, momentum=0.9) for part in (0, 1)])
    return kind(params, lr=0.1, momentum=0.9)


def join(features: frozenset[str], stage: int, mesh: Mesh) -> tuple[nn.Module, ShardedOptimizer, FlatOwner]:
    real = build(features)
    if "meta" in features:
        with torch.device("meta"):
            model = build(features)
    else:
        model = build(features)
    named = dict(zip(model.modules(), real.modules(), strict=True))

    def initializer(module: nn.Module) -> None:
        for to, value in zip(module._parameters.values(), named[module]._parameters.values(), strict=True):
            if to is not None and value is not None and not to.is_meta:
                to.copy_(value)
        for to, value in zip(module._buffers.values(), named[module]._buffers.values(), strict=True):
            if to is not None and value is not None:
                to.copy_(value)

    optimizer = sgd(model, features)
    dtype = next((DTYPES[name] for name in features if name in DTYPES), None)
    dtype = torch.float16 if "loss scale" in features else dtype
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    cut = "whole" if "whole cut" in features else "flat"
    reduce = CastCodec(torch.bfloat16) if "reduce codec" in features else None
    owner: FlatOwner
    if stage == 0:
        owner = ReplicatedOwner(model, mesh, dtype=dtype, cut=cut, reduce=reduce, bucket_numel=100)
    else:
        owner = Zero(
            stage=stage,
            dtype=name,
            cut=cut,
            bucket_numel=100,
            prefetch_numel=600,
            keep_numel=100,
            persist_numel=200 if "persist" in features else 0,
            secondary_shard="second shard" in features,
            initializer=initializer if "meta" in features else None,
        ).shard(
            model,
            mesh,
            reduce=reduce,
            gather=CastCodec(torch.bfloat16) if "gather codec" in features else None,
        )
    return model, ShardedOptimizer(optimizer, owner), owner


def whole_values(model: nn.Module, owner: FlatOwner) -> dict[str, Tensor]:
    """What the next forward computes with."""
    found = {}
    for name, param in model.named_parameters():
        unit, _ = owner.place(param)
        found[name] = param.detach().clone() if unit.keep_whole else full_tensor(param)
    return found


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p, master=True) for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, owner: FlatOwner) -> dict[str, Tensor]:
    """Whole gradients, unit by unit where the shards of one axis make the unit, which is faster."""
    if owner.features & ACROSS_NODES:
        return {name: found for name, p in model.named_parameters() if (found := full_grad(p)) is not None}
    found = {}
    for unit in owner.trainable:
        assert unit.gradient is not None
        flat = unit.gradient
        if owner.sharded:
            flat = torch.empty(unit.layout.numel, dtype=unit.gradient.dtype)
            owner.gather_comm.all_gather(flat, unit.gradient).wait()
        for slot in unit.layout.slots:
            found[slot.fqn] = flat[slot.start : slot.end].view(slot.shape).clone()
    return found


def expected_gradients(
    features: frozenset[str], values: dict[str, Tensor], seeds: list[int], ranks: int, scale: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The mean over micro batches and ranks in one process, and the mean norm of its parts."""
    reference = build(features)
    for name, param in reference.named_parameters():
        param.data = values[name].clone()
    count = len(seeds) * ranks
    sums: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for seed in seeds:
        for rank in range(ranks):
            (loss,) = CASE.losses(reference, CASE.rank_batch(seed, rank, ranks))
            (loss * scale).backward()
            for name, param in reference.named_parameters():
                if param.grad is not None:
                    part = param.grad.float() / (scale * count)
                    sums[name] = sums[name] + part if name in sums else part
                    sizes[name] = sizes.get(name, 0.0) + float(part.norm())
                    param.grad = None
    return sums, sizes


def train(features: frozenset[str], stage: int, mesh: Mesh) -> None:
    """Two steps; gradients, masters and averages are compared after each."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizer, owner = join(features, stage, mesh)
    scale = 2.0**6 if features & {"fp16", "loss scale"} else 1.0
    micros = 2 if features & {"accumulation", "no_sync"} else 1
    ema = EMA(model, DECAY) if "EMA" in features else None
    plain = build(features)
    with torch.no_grad():
        for name, value in masters(model).items():
            plain.get_parameter(name).copy_(value)
    stepping = sgd(plain, features)
    average = {name: value.clone() for name, value in masters(model).items()}
    rounded = [owner.trainable[0].dtype, torch.bfloat16 if "reduce codec" in features else torch.float32]
    unit = max(ROUNDOFF.get(dtype, 0.0) for dtype in rounded)
    for step in range(STEPS):
        seeds = [10 * step + micro for micro in range(micros)]
        expected, sizes = expected_gradients(features, whole_values(model, owner), seeds, ranks, scale)
        for number, seed in enumerate(seeds):
            hold = "no_sync" in features and number + 1 < micros
            with no_sync(model) if hold else contextlib.nullcontext():
                (loss,) = CASE.losses(model, CASE.rank_batch(seed, rank, ranks))
                (loss * scale / micros).backward()
        optimizer.show_grads()
        for gradient in optimizer.gradients():
            gradient.div_(scale)
        found = gradients(model, owner)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            gap = float((gradient.double() - expected[name].double()).norm())
            bound = (ROUNDINGS * unit + 1e-5) * sizes[name]
            assert gap <= bound, f"{name} in step {step}: ||d|| = {gap:.2e} > {bound:.2e}"
        optimizer.step()
        optimizer.zero_grad()
        for name, gradient in found.items():
            plain.get_parameter(name).grad = gradient
        stepping.step()
        now = masters(model)
        assert_close_norm(now, {name: plain.get_parameter(name).detach() for name in now}, 1e-6)
        average = {name: value + (1 - DECAY) * (now[name] - value) for name, value in average.items()}
        if ema is not None:
            with ema.applied():
                assert_close_norm(masters(model), average, 1e-6)


def chosen(stage: int, *, across: bool) -> list[frozenset[str]]:
    return [features for features in combos(stage) if bool(features & ACROSS_NODES) == across]


def every_combination(stage: int, across: bool) -> int:
    mesh = Topology(dp_replicate=2, dp_shard=2).build() if across else Topology().build()
    for features in chosen(stage, across=across):
        try:
            train(features, stage, mesh)
        except Exception as fault:
            raise AssertionError(f"stage {stage}, {' with '.join(sorted(features))}: {fault}") from fault
    return len(chosen(stage, across=across))


@pytest.mark.parametrize("stage", STAGES)
def test_what_goes_together_equals_the_unsharded_model(stage: int) -> None:
    """The masters are held to plain SGD on the very gradients that were compared before."""
    done = run_ranks(every_combination, 2, timeout=120.0, stage=stage, across=False)
    assert done == [len(chosen(stage, across=False))] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_what_goes_with_replicas_equals_the_unsharded_model(stage: int) -> None:
    done = run_ranks(every_combination, 4, timeout=120.0, stage=stage, across=True)
    assert done == [len(chosen(stage, across=True))] * 4


def named(test: str) -> Iterator[Any]:
    file, _, function = test.partition("::")
    yield from re.findall(rf"^def {function}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)


def test_every_test_that_the_table_names_is_there() -> None:
    assert [test for test in tests() if len(list(named(test))) != 1] == []
