"""Every yes of ds_core/limits.py: each feature, and each pair of them, trained at each stage on two ranks."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_core import (
    CheckpointStore,
    JointOptimizer,
    ReplicatedOwner,
    ShardedOptimizer,
    Topology,
    checkpoint_blocks,
)
from ds_core.ground.codec import CastCodec
from ds_core.ground.mesh import Mesh
from ds_core.limits import ACROSS_NODES, STAGES, at_stage, combos
from ds_core.limits import tests as named_tests
from ds_core.protocols import Store
from ds_core.state.owner import FlatOwner
from ds_core.state.unit import FlatUnit, gather_shards
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES, TinyLM
from ds_core.testing.parity import assert_close_norm
from ds_offload import TieredStore, offload_activations, offload_blocks
from ds_zero import EMA, Zero, compile_blocks, gather, no_sync

RANKS_IMPORT = ("torch._inductor.pattern_matcher", "networkx")
CASE = CASES["tied"]
ROOT = Path(__file__).parents[2]
AWAY = f"nvme:{tempfile.gettempdir()}"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DECAY = 0.75
# Unit roundoff of what gradients are rounded to on the wire. A gradient is rounded once there, and at stage
# 0 once more in the one addition that two ranks need (across replicas, too); its parts come from autograd
# rounded on both sides.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = 2
# What is done with the joined objects, or joined later: an owner cannot see it.
DONE = frozenset({"loss scale", "accumulation", "no_sync", "several optimizers", "EMA", "other world"})
DONE |= {"reentrant", "non-reentrant"}
IN_THE_MODEL = frozenset({"tied", "frozen", "reentrant", "non-reentrant"})
# Where training state lives: some units on the device, the others' on host and disk.
TIERS: dict[str, Any] = {
    "params": "0.2 device / 0.8 nvme",
    "grads": "0.2 device / 0.3 host / 0.5 nvme",
    "masters": "0.3 device / 0.7 nvme",
    "moments": "0.3 device / 0.7 host",
    "depth": 2,
}
# How `checkpoint_blocks` is called, by stage: each choice of blocks and of where inputs are kept.
POLICIES: list[dict[str, Any]] = [
    {},
    {"which": 2},
    {"which": r"blocks.1$", "keep": functools.partial(torch.autograd.graph.save_on_cpu)},
    {"keep": functools.partial(torch.autograd.graph.save_on_cpu)},
]


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
        torch.default_generator.manual_seed(0)  # torch.manual_seed writes down a stack for each kind of GPU
        model = Checkpointed(ways, tied="tied" in features)
    if "frozen" in features:
        model.blocks[0].requires_grad_(False)
        model.norm.bias.requires_grad_(False)
    return model


@functools.cache
def twin(features: frozenset[str]) -> nn.Module:
    """The unsharded model whose values are set anew for each comparison."""
    return build(features)


def sgd(model: nn.Module, features: frozenset[str]) -> torch.optim.Optimizer:
    kind = NeedsMatrices if "whole cut" in features else torch.optim.SGD
    params = [p for p in model.parameters() if p.requires_grad]
    if "several optimizers" in features:
        return JointOptimizer([kind(params[part::2], lr=0.1, momentum=0.9) for part in (0, 1)])
    return kind(params, lr=0.1, momentum=0.9)


@dataclass
class Run:
    """What was joined, and the share of the data that is this rank's."""

    model: nn.Module
    optimizer: ShardedOptimizer
    owner: FlatOwner
    ema: EMA | None
    rank: int
    ranks: int

    @property
    def parts(self) -> dict[str, Any]:
        """Of a checkpoint."""
        found = {"model": self.owner, "optimizer": self.optimizer}
        return found | ({"ema": self.ema} if self.ema is not None else {})


def join(features: frozenset[str], stage: int, mesh: Mesh, disk: Path) -> Run:
    model = real = build(features)
    if "meta" in features:
        with torch.device("meta"):
            model = build(features)
    named = dict(zip(model.modules(), real.modules(), strict=True))

    def initializer(module: nn.Module) -> None:
        for to, value in zip(module._parameters.values(), named[module]._parameters.values(), strict=True):
            if to is not None and value is not None and not to.is_meta:
                to.copy_(value)
        for to, value in zip(module._buffers.values(), named[module]._buffers.values(), strict=True):
            if to is not None and value is not None:
                to.copy_(value)

    if "compile" in features:  # inductor has a row in ../parity/test_compile.py
        compile_blocks(model, backend="aot_eager", fullgraph=True)
    if "recompute" in features:
        checkpoint_blocks(model, **POLICIES[stage])
    if "activations away" in features:
        offload_blocks(model, offload_activations(model, AWAY, min_bytes=1, ahead_bytes=256))
    store = TieredStore(nvme=str(disk), **TIERS) if "offload" in features else None
    owner = shard(features, stage, mesh, model, initializer, store)
    assert features - DONE <= owner.features
    optimizer = ShardedOptimizer(sgd(model, features), owner)
    ema = EMA(model, DECAY) if "EMA" in features else None
    return Run(model, optimizer, owner, ema, mesh.rank("data"), mesh.size("data"))


def shard(
    features: frozenset[str],
    stage: int,
    mesh: Mesh,
    model: nn.Module,
    initializer: Callable[..., None],
    store: Store | None,
) -> FlatOwner:
    dtype = next((DTYPES[name] for name in features if name in DTYPES), None)
    dtype = torch.float16 if "loss scale" in features else dtype
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    settings: dict[str, Any] = {
        "cut": "whole" if "whole cut" in features else "flat",
        "keep_fp32": ("*norm*",) if "keep_fp32" in features else (),
        "leaves": ("blocks",) if "leaves" in features else (),
        "bucket_numel": 100,
    }
    reduce = CastCodec(torch.bfloat16) if "reduce codec" in features else None
    if stage == 0:
        return ReplicatedOwner(model, mesh, dtype=dtype, reduce=reduce, store=store, **settings)
    config = Zero(
        stage=stage,
        dtype=name,
        prefetch_numel=600,
        keep_numel=100,
        persist_numel=200 if "persist" in features else 0,
        secondary_shard="second shard" in features,
        initializer=initializer if "meta" in features else None,
        **settings,
    )
    wire = CastCodec(torch.bfloat16) if "gather codec" in features else None
    return config.shard(model, mesh, reduce=reduce, gather=wire, store=store)


def go_on(run: Run, features: frozenset[str], stage: int, mesh: Mesh, worlds: Worlds) -> Run:
    """From a checkpoint, in another world: every master and every average is the same there."""
    worlds.store.save(0, run.parts)
    other = join(features, stage, mesh, worlds.disk)
    worlds.store.load(other.parts)
    for one, two in zip(states(run), states(other), strict=True):
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    return other


def states(run: Run) -> list[dict[str, Tensor]]:
    """Masters, and averages where there are any."""
    found = [masters(run.owner)]
    if run.ema is not None:
        with run.ema.applied():
            found.append(masters(run.owner))
    return found


def other_world(features: frozenset[str], stage: int) -> tuple[frozenset[str], int]:
    """What there is of these features without nodes, and the next stage that has all of it."""
    features -= ACROSS_NODES
    stages = [(stage + more) % len(STAGES) for more in range(1, 1 + len(STAGES))]
    after = next(each for each in stages if all(at_stage(name, each).works for name in features))
    return features, after


def whole_values(run: Run) -> dict[str, Tensor]:
    """What the next forward computes with."""
    with gather(run.model):
        return {name: param.detach().clone() for name, param in run.model.named_parameters()}


def masters(owner: FlatOwner) -> dict[str, Tensor]:
    """All of them, and frozen parameters."""
    owner.settle()
    return whole(owner, [(unit, unit.values().detach()) for unit in owner.units])


def gradients(owner: FlatOwner) -> dict[str, Tensor]:
    return whole(owner, [(unit, unit.gradient) for unit in owner.trainable if unit.gradient is not None])


def whole(owner: FlatOwner, shards: list[tuple[FlatUnit, Tensor]]) -> dict[str, Tensor]:
    """Every rank's shards together, by parameter; a gather for each unit, not for each parameter."""
    found = {}
    for unit, shard in shards:
        flat = gather_shards(owner.gather_comm, unit, shard)
        for slot in unit.layout.slots:
            found[slot.fqn] = flat[slot.start : slot.end].view(slot.shape).clone()
    return found


def expected_gradients(
    features: frozenset[str], values: dict[str, Tensor], seeds: list[int], ranks: int, scale: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The mean over micro batches and ranks in one process, and the mean norm of its parts."""
    reference = twin(features & IN_THE_MODEL)
    named = dict(reference.named_parameters())
    for name, param in named.items():
        param.data = values[name].clone()
    count = len(seeds) * ranks
    sums: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for seed in seeds:
        for rank in range(ranks):
            (loss,) = CASE.losses(reference, CASE.rank_batch(seed, rank, ranks))
            (loss * scale).backward()
            for name, param in named.items():
                if param.grad is not None:
                    part = param.grad.float() / (scale * count)
                    sums[name] = sums[name] + part if name in sums else part
                    sizes[name] = sizes.get(name, 0.0) + float(part.norm())
                    param.grad = None
    return sums, sizes


class Reference:
    """Plain SGD and a plain average, which are given the gradients that were compared before."""

    def __init__(self, features: frozenset[str], start: dict[str, Tensor]) -> None:
        self.model = build(features)
        with torch.no_grad():
            for name, value in start.items():
                self.model.get_parameter(name).copy_(value)
        self.optimizer = sgd(self.model, features)
        self.average = dict(start)

    def step(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, gradient in gradients.items():
            self.model.get_parameter(name).grad = gradient
        self.optimizer.step()
        return {name: param.detach() for name, param in self.model.named_parameters()}

    def follow(self, now: dict[str, Tensor]) -> None:
        """The average of the very masters that were compared before."""
        self.average = {n: value + (1 - DECAY) * (now[n] - value) for n, value in self.average.items()}


@dataclass
class Worlds:
    """Where runs are joined: here, and where half as many ranks share the data."""

    here: Mesh
    other: Mesh
    store: CheckpointStore
    disk: Path


def train(features: frozenset[str], stage: int, worlds: Worlds) -> None:
    """Two steps here, and of some one in another world and one here again; each is compared."""
    run = join(features, stage, worlds.here, worlds.disk)
    reference = Reference(features, masters(run.owner))
    for step in range(2):
        compare(run, features, step, reference)
    if "other world" in features:
        run = go_on(run, *other_world(features, stage), worlds.other, worlds)
        compare(run, features, 2, reference)
        run = go_on(run, features, stage, worlds.here, worlds)
        compare(run, features, 3, reference)


def compare(run: Run, features: frozenset[str], step: int, reference: Reference) -> None:
    """One step, whose gradients, masters and averages are compared."""
    scale = 2.0**6 if features & {"fp16", "loss scale"} else 1.0
    seeds = [10 * step + micro for micro in range(2 if features & {"accumulation", "no_sync"} else 1)]
    ranks = dist.get_world_size()
    expected, sizes = expected_gradients(features, whole_values(run), seeds, ranks, scale)
    each = ranks // run.ranks  # of the parts of a batch
    mine = [(seed, run.rank * each + part) for seed in seeds for part in range(each)]
    for number, (seed, part) in enumerate(mine, 1):
        hold = "no_sync" in features and number < len(mine)
        with no_sync(run.model) if hold else contextlib.nullcontext():
            (loss,) = CASE.losses(run.model, CASE.rank_batch(seed, part, ranks))
            (loss * scale / len(mine)).backward()
    run.optimizer.show_grads()
    for gradient in run.optimizer.gradients():
        gradient.div_(scale)
    found = gradients(run.owner)
    assert found.keys() == expected.keys()
    rounded = {unit.dtype for unit in run.owner.trainable}
    rounded |= {torch.bfloat16} if "reduce codec" in features else set()
    roundoff = max(ROUNDOFF.get(dtype, 0.0) for dtype in rounded)
    for name, gradient in found.items():
        gap = float((gradient.double() - expected[name].double()).norm())
        bound = (ROUNDINGS * roundoff + 1e-5) * sizes[name]
        assert gap <= bound, f"{name} in step {step}: ||d|| = {gap:.2e} > {bound:.2e}"
    run.optimizer.step()
    run.optimizer.zero_grad()
    now = masters(run.owner)
    assert_close_norm(now, reference.step(found), 1e-6)
    reference.follow(now)
    if run.ema is not None:
        with run.ema.applied():
            assert_close_norm(masters(run.owner), reference.average, 1e-6)


def chosen(stage: int, *, across: bool, compiled: bool) -> list[frozenset[str]]:
    """The combinations that are trained together, of those that work at a stage."""
    return [f for f in combos(stage) if (bool(f & ACROSS_NODES), "compile" in f) == (across, compiled)]


def every_combination(stages: list[int], across: bool, compiled: bool, folder: Path) -> int:
    mesh = Topology(dp_replicate=2) if across else Topology()
    worlds = Worlds(mesh.build(), Topology(tp=2).build(), CheckpointStore(folder, keep=1), folder)
    done = 0
    for stage in stages:
        for features in chosen(stage, across=across, compiled=compiled):
            try:
                train(features, stage, worlds)
            except Exception as fault:
                raise AssertionError(f"stage {stage}, {' with '.join(sorted(features))}: {fault}") from fault
            done += 1
    return done


def train_all(stages: list[int], folder: Path, *, across: bool, compiled: bool) -> None:
    ranks = 4 if across else 2
    settings: dict[str, Any] = {"across": across, "compiled": compiled}
    done = run_ranks(every_combination, ranks, timeout=120.0, stages=stages, folder=folder, **settings)
    assert done == [sum(len(chosen(stage, **settings)) for stage in stages)] * ranks
    assert done[0] > 0


# Compiled blocks at all stages in one process: what is compiled at one serves the others.
PARTS = [pytest.param([stage], False, id=str(stage)) for stage in STAGES]
PARTS += [pytest.param(list(STAGES), True, id="compiled")]


@pytest.mark.parametrize(("stages", "compiled"), PARTS)
def test_what_goes_together_equals_the_unsharded_model(
    stages: list[int], compiled: bool, tmp_path: Path
) -> None:
    """The masters are held to plain SGD on the very gradients that were compared before."""
    train_all(stages, tmp_path, across=False, compiled=compiled)


@pytest.mark.parametrize(("stages", "compiled"), PARTS)
def test_what_goes_with_replicas_equals_the_unsharded_model(
    stages: list[int], compiled: bool, tmp_path: Path
) -> None:
    train_all(stages, tmp_path, across=True, compiled=compiled)


def test_every_combination_is_trained() -> None:
    kinds = [(across, compiled) for across in (False, True) for compiled in (False, True)]
    for stage in STAGES:
        trained = [f for a, c in kinds for f in chosen(stage, across=a, compiled=c)]
        assert sorted(map(sorted, trained)) == sorted(map(sorted, combos(stage)))


def named(test: str) -> Iterator[Any]:
    file, _, function = test.partition("::")
    yield from re.findall(rf"^def {function}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)


def test_every_test_that_the_table_names_is_there() -> None:
    assert [test for test in named_tests() if len(list(named(test))) != 1] == []
