"""Random models with random control flow: what one seed builds, does, and must equal."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_core import Mesh, ShardedOptimizer
from ds_zero import Zero, full_tensor, gather

WIDTH = 6
STEPS = 4
LR = 0.05
RELATIVE = 1e-5  # of each tensor's norm: fp32, a few dozen additions in another order
CONDITION = 8.0  # two fp32 sums in different orders may lie on opposite sides of the truth, and further
# A weight near zero is what its gradients left: sums of up to 64 terms of size one, each addition rounded.
ABSOLUTE = LR * STEPS * 64 * 2**-24  # of each element


class Experts(nn.Module):
    """A rank-dependent choice inside one block: the others starve on this rank."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor, pick: int) -> Tensor:
        chosen: Tensor = self.experts[pick % len(self.experts)](x)
        return x + chosen


class Block(nn.Module):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=rng.random() < 0.5)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH)) if rng.random() < 0.3 else None
        self.pick = Experts(rng.randint(2, 3)) if rng.random() < 0.3 else None

    def forward(self, x: Tensor, pick: int) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        if self.gain is not None:
            y = y * self.gain
        return x + y if self.pick is None else self.pick(x + y, pick)


@dataclass(frozen=True)
class Call:
    """One line of a model's program: which module, how often, and under which condition."""

    module: str
    times: int
    when: str  # always | training | even turns | odd turns
    how: str  # plain | residual | checkpoint | reentrant


class Random(nn.Module):
    """A program of calls over blocks, leaves, a parameter of its own and a tied weight; may leave early.

    Everything that ranks must agree on depends on `turn` alone; `pick` may differ between ranks and only
    chooses inside a block.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(rng) for _ in range(rng.randint(2, 4)))
        self.side = nn.ModuleDict(
            {name: nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.5) for name in "ab"[: rng.randint(1, 2)]}
        )
        self.leave = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH)) if rng.random() < 0.4 else None
        if rng.random() < 0.4:
            self.leave.weight = self.enter.weight
        if rng.random() < 0.3:
            self.side["a"].weight = self.enter.weight
        for param in self.parameters():
            if rng.random() < 0.1:
                param.requires_grad_(False)
        self.enter.weight.requires_grad_(True)
        names = [f"blocks.{n}" for n in range(len(self.blocks))] + [f"side.{n}" for n in self.side]
        conditions = ["always"] * 5 + ["training", "even turns", "odd turns"]
        manners = ["plain", "residual", "residual", "checkpoint", "reentrant"]
        self.program = [
            Call(
                rng.choice(names), rng.choice([0, 1, 1, 1, 2, 3]), rng.choice(conditions), rng.choice(manners)
            )
            for _ in range(rng.randint(2, 7))
        ]
        self.skip_from = rng.randrange(len(self.program)) if rng.random() < 0.5 else None
        self.exit_after = rng.randrange(len(self.program)) if rng.random() < 0.3 else None
        self.raises_after = rng.randrange(len(self.program)) if rng.random() < 0.4 else None

    def forward(self, x: Tensor, turn: int, pick: int, *, fails: bool = False) -> Tensor:
        x = torch.tanh(self.enter(x))
        skipped: Tensor | None = None
        for number, call in enumerate(self.program):
            if self._runs(call, turn):
                for _ in range(call.times):
                    x = self._call(call, x, pick)
            if number == self.skip_from:
                skipped = x
            if fails and number == self.raises_after:
                raise ArithmeticError("planted")
            if number == self.exit_after and turn % 2:
                return x.square()
        if skipped is not None:
            x = x + skipped
        if self.scale is not None:
            x = x * self.scale
        out: Tensor = self.leave(x)
        return out

    def _runs(self, call: Call, turn: int) -> bool:
        return {
            "always": True,
            "training": self.training,
            "even turns": turn % 2 == 0,
            "odd turns": turn % 2 == 1,
        }[call.when]

    def _call(self, call: Call, x: Tensor, pick: int) -> Tensor:
        module = self.get_submodule(call.module)
        run: Callable[[Tensor], Tensor] = (
            module if call.module.startswith("side") else lambda y: module(y, pick)
        )
        if call.how in ("checkpoint", "reentrant"):
            again: Tensor = checkpoint(run, x, use_reentrant=call.how == "reentrant")
            return torch.tanh(again)
        return torch.tanh(run(x) + x if call.how == "residual" else run(x))


def batch(seed: int, turn: int, rank: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1000 * seed + 10 * turn + rank))


def make(seed: int, which: int = 0) -> Random:
    # Not torch.manual_seed, which writes down a stack for each kind of GPU.
    torch.default_generator.manual_seed(seed + 7 * which)
    return Random(random.Random(f"{seed}/{which}"))


Losses = Iterator[tuple[Sequence[int], Tensor]]  # (which models step on it, its loss)


def losses(seed: int, models: Sequence[Random], turn: int, rank: int) -> Losses:
    """What one seed trains: one model, two losses of it, two in one loss, or a GAN's alternating steps."""
    kind = ("one", "one", "two losses", "chain", "gan")[seed % 5]
    x, pick = batch(seed, turn, rank).to(models[0].enter.weight.dtype), turn + rank
    first = models[0]
    if kind == "one":
        yield (0,), first(x, turn, pick).square().mean()
    elif kind == "two losses":
        y = first(x, turn, pick)
        yield (0,), y.square().mean() + first(x + 1, turn, pick).abs().mean()
    elif kind == "chain":
        yield (0, 1), models[1](first(x, turn, pick), turn, pick).square().mean()
    else:
        fake = first(x, turn, pick)
        judged = models[1](fake.detach(), turn, pick).mean() - models[1](x, turn, pick).mean()
        yield (1,), judged
        yield (0,), -models[1](first(x, turn, pick), turn, pick).mean()


def needs_two(seed: int) -> bool:
    return seed % 5 >= 3


History = list[list[dict[str, Tensor]]]  # step -> model -> weights after it


def expected(seed: int, world: int, dtype: torch.dtype = torch.float32) -> History:
    """The unsharded twins, stepped on the mean of all ranks' gradients."""
    models = [make(seed, which).to(dtype) for which in range(1 + needs_two(seed))]
    optimizers = [torch.optim.SGD(m.parameters(), lr=LR) for m in models]
    history: History = []
    for turn in range(STEPS):
        _set_mode(seed, models, turn)
        streams = [losses(seed, models, turn, rank) for rank in range(world)]
        for parts in zip(*streams, strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if parts[0][1].requires_grad:
                torch.stack([loss for _, loss in parts]).mean().backward()
            for which in parts[0][0]:
                optimizers[which].step()
        history.append([{n: p.detach().clone() for n, p in m.named_parameters()} for m in models])
    return history


def _set_mode(seed: int, models: Sequence[Random], turn: int) -> None:
    for model in models:
        model.train((seed + turn) % 3 != 0)


def run_seed(mesh: Mesh, seed: int, stage: int, history: History) -> None:
    """Train sharded and compare every weight after every step with what is `expected`.

    Raises AssertionError naming what differs.
    """
    rank = dist.get_rank()
    models = [make(seed, which) for which in range(1 + needs_two(seed))]
    rng = random.Random(seed)
    settings = {
        "bucket_numel": rng.choice([1, 60, 10**6]),
        "prefetch_numel": rng.choice([0, 1, 100, 10**6]),
        "keep_numel": rng.choice([0, 1, 100, 10**6]),
    }
    optimizers = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        owner = Zero.model_validate({"stage": stage, **settings}).shard(model, mesh)
        optimizers.append(ShardedOptimizer(optimizer, owner))
    for turn in range(STEPS):
        _set_mode(seed, models, turn)
        _fail_once(seed, models, turn, rank)
        for which, loss in losses(seed, models, turn, rank):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            for number in which:
                optimizers[number].step()
        if seed % 4 == 0:
            with torch.no_grad():  # an evaluation between two steps
                models[0].eval()
                models[0](batch(seed, turn, rank), turn, rank)
        for number, (model, wanted) in enumerate(zip(models, history[turn], strict=True)):
            one_by_one = turn == seed % STEPS
            with contextlib.nullcontext() if one_by_one else gather(model):
                for name, param in model.named_parameters():
                    got = full_tensor(param) if one_by_one else param.detach()
                    _compare(seed, turn, number, name, got, wanted[name])


def _fail_once(seed: int, models: Sequence[Random], turn: int, rank: int) -> None:
    """On some steps a forward raises halfway, on all ranks; what it left behind must not matter."""
    if turn % 2 == 0 or models[0].raises_after is None:
        return
    try:
        models[0](batch(seed, turn, rank), turn, turn + rank, fails=True)
    except ArithmeticError:
        return


def _compare(seed: int, turn: int, number: int, name: str, got: Tensor, wanted: Tensor) -> None:
    off = float((got - wanted).norm())
    bound = RELATIVE * float(wanted.norm()) + ABSOLUTE * wanted.numel() ** 0.5
    if off > bound:  # ill-conditioned? Then fp32 itself is as far from the truth.
        truth = expected(seed, dist.get_world_size(), torch.float64)[turn][number][name]
        bound = max(bound, CONDITION * float((wanted - truth).norm()))
    assert off <= bound, f"model {number}, step {turn}, {name}: off by {off:.2e}, allowed {bound:.2e}"
