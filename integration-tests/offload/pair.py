"""Two runs of the same training, one without a store and one with: nothing may differ in a single bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core import ReplicatedOwner, ShardedOptimizer
from ds_core.ground.mesh import Mesh
from ds_core.state.owner import FlatOwner
from ds_core.testing.models import CASES, Case, Stack
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore
from ds_zero import Zero, clip_grad_norm_

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**6  # of the loss in fp16
CHUNK = 4096  # the smallest: several of them in one unit of "wide"


def _wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack((64, 128, 4), depth=2)


# Units of 16704 elements, so that one has several chunks, and shares of it on host and disk.
WIDE = dataclasses.replace(CASES["mlp"], build=_wide)
ALL_CASES: dict[str, Case] = {**CASES, "wide": WIDE}

POLICIES: dict[str, dict[str, str]] = {
    "nvme": dict.fromkeys(("params", "grads", "masters", "moments"), "nvme"),
    "host": dict.fromkeys(("params", "grads", "masters", "moments"), "host"),
    "mixed": {
        "params": "0.4 host / 0.6 nvme",
        "grads": "0.5 host / 0.5 nvme",
        "masters": "0.3 device / 0.4 host / 0.3 nvme",
        "moments": "0.3 device / 0.7 nvme",
    },
    "moments": {"grads": "device", "masters": "host", "moments": "nvme"},
    "grads": {"grads": "nvme", "masters": "host", "moments": "host"},
}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def fused(params: Any) -> torch.optim.Optimizer:
    return FusedAdamW(params, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "momentum": momentum,
    "fused": fused,
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@dataclass
class Run:
    """A model that is trained, with or without a store."""

    case: Case
    model: nn.Module
    sharded: ShardedOptimizer
    store: TieredStore | None
    dtype: torch.dtype | None

    @property
    def owner(self) -> FlatOwner:
        return self.sharded.owner

    @property
    def scale(self) -> float:
        return SCALE if self.dtype == torch.float16 else 1.0

    @property
    def parts(self) -> dict[str, Any]:
        """Of a checkpoint."""
        return {"model": self.owner, "optimizer": self.sharded}

    def backward(self, step: int, accumulate: int = 1) -> list[float]:
        """Gradients of one step, left unreduced; returns the losses."""
        rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
        for micro in range(accumulate):
            losses = self.case.losses(self.model, self.case.rank_batch(100 * step + micro, rank, ranks))
            found += [float(loss.detach()) for loss in losses]
            for number, loss in enumerate(losses):  # two losses: two backwards over one graph
                (loss * self.scale / accumulate).backward(retain_graph=number + 1 < len(losses))
        return found

    def finish(self, max_norm: float | None = None) -> float:
        """The step itself; returns the norm, if it is clipped."""
        self.sharded.show_grads()
        for gradient in self.sharded.gradients():
            gradient.div_(self.scale)
        norm = 0.0 if max_norm is None else float(clip_grad_norm_(self.sharded, max_norm))
        self.sharded.optimizer.step()
        self.sharded.optimizer.zero_grad()
        return norm

    def step(self, step: int, accumulate: int = 1, max_norm: float | None = None) -> list[float]:
        """Losses, and the norm if it is clipped."""
        losses = self.backward(step, accumulate)
        return [*losses, self.finish(max_norm)]

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def start(
    case: Case,
    stage: int,
    mesh: Mesh | None = None,
    *,
    make: Callable[[Any], torch.optim.Optimizer] = adamw,
    dtype: torch.dtype | None = None,
    store: TieredStore | None = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> Run:
    """Shard a case's model in small units, so that there are several."""
    model = case.build() if model is None else model
    optimizer = make(trained(model))
    common = {"bucket_numel": 1, **settings}
    owner: FlatOwner
    if stage == 0:
        owner = ReplicatedOwner(model, mesh, dtype=dtype, store=store, **common)
    else:
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        given = {"stage": stage, "dtype": name, "keep_numel": 1, **common}
        owner = Zero.model_validate(given).shard(model, mesh, store=store)
    return Run(case, model, ShardedOptimizer(optimizer, owner), store, dtype)


def differing(one: Run, other: Run) -> list[str]:
    """What is not equal to the bit on this rank: gradients, masters, shards, copies, states, options."""
    found: list[str] = []

    def hold(what: str, mine: Any, theirs: Any) -> None:
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            same = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
        else:
            same = type(mine) is type(theirs) and mine == theirs
        if not same:
            found.append(what)

    for left in (one, other):
        left.owner.settle()
    for mine, theirs in zip(one.owner.units, other.owner.units, strict=True):
        hold(f"{mine.key}: which slots have a gradient", mine.has_grad, theirs.has_grad)
        hold(f"{mine.key}: gradient", mine.gradient, theirs.gradient)
        hold(f"{mine.key}: values", mine.values(), theirs.values())
        hold(f"{mine.key}: shard", mine.local, theirs.local)
        if mine.keep_whole:
            hold(f"{mine.key}: whole copy", mine.whole, theirs.whole)
    for piece, twin in zip(one.sharded.pieces, other.sharded.pieces, strict=True):
        state = one.sharded.optimizer.state.get(piece.param, {})
        elsewhere = other.sharded.optimizer.state.get(twin.param, {})
        hold(f"{piece.fqn}: names of states", sorted(state), sorted(elsewhere))
        for name in state:
            hold(f"{piece.fqn}/{name}", state[name], elsewhere.get(name))
    known = [sum(map(bool, run.sharded.optimizer.state.values())) for run in (one, other)]
    hold("parameters with a state", *known)
    for number, (options, others) in enumerate(
        zip(one.sharded.param_groups, other.sharded.param_groups, strict=True)
    ):
        plain = {name: value for name, value in options.items() if name != "params"}
        hold(f"options of group {number}", plain, {name: others.get(name) for name in plain})
    return found


def hold_equal(one: Run, other: Run, when: str) -> None:
    """Raises AssertionError naming everything that differs."""
    found = differing(one, other)
    assert not found, f"{when}: {len(found)} differ: {', '.join(found[:8])}"


def pairwise(choices: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Rows that between them have every two values of any two columns together (greedy, always the same)."""

    def pairs(row: Sequence[Any]) -> Iterable[tuple[int, Any, int, Any]]:
        for left, right in combinations(range(len(row)), 2):
            yield left, row[left], right, row[right]

    columns = range(len(choices))
    wanted = {
        (left, a, right, b): None
        for left, right in combinations(columns, 2)
        for a, b in product(choices[left], choices[right])
    }
    while wanted:
        left, a, right, b = next(iter(wanted))
        row: dict[int, Any] = {left: a, right: b}
        for column in columns:
            if column not in row:
                row[column] = max(
                    choices[column],
                    key=lambda value, column=column: sum(
                        ((at, chosen, column, value) if at < column else (column, value, at, chosen))
                        in wanted
                        for at, chosen in row.items()
                    ),
                )
        done = tuple(row[column] for column in columns)
        for pair in pairs(done):
            wanted.pop(pair, None)
        yield done
