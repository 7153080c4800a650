"""Gradients that are added up on the host, and the optimizer's rule applied to their mean, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_offload.buffers import Turn, Turns
from ds_offload.home import Home
from ds_offload.plan import Chunk, StepPlan, plan_chunks
from ds_offload.policy import Tiered
from ds_offload.zen_rule import Given, Rule

Measure = Callable[[str, Tensor], None]  # told of a parameter's gradient, or of a part of it


def unmeasured(fqn: str, gradient: Tensor) -> None:
    """Nobody wants to know."""


@dataclass(slots=True)
class Stretch:
    """Elements [low, high) of a unit's shard: this rank's piece of one parameter."""

    fqn: str
    low: int
    high: int

    def within(self, chunk: Chunk) -> slice | None:
        """Its part of a chunk, counted from the chunk's beginning; None where they do not meet."""
        low, high = max(self.low, chunk.begin), min(self.high, chunk.end)
        return slice(low - chunk.begin, high - chunk.begin) if low < high else None


@dataclass(slots=True)
class Due(Stretch):
    """One that is updated with the mean of `count` gradients that were added up."""

    group: int
    count: int
    names: tuple[str, ...]  # of the states that it has
    numbers: dict[str, Any]


@dataclass(slots=True)
class Job:
    """The update of one unit. `homes`: "master" and states by name; `new_state` makes a home for another."""

    key: str
    numel: int
    homes: dict[str, Home]
    summed: Home
    stretches: list[Due]
    new_state: Callable[[str, torch.dtype], Home]


@dataclass(slots=True)
class Window:
    """A chunk of a home in memory: a view where it is there, else a buffer."""

    home: Home
    begin: int
    tensor: Tensor
    buffered: bool


@dataclass(slots=True)
class Opened:
    chunk: Chunk
    turn: Turn
    windows: dict[str, Window] = field(default_factory=dict)
    reading: list[Future[int]] = field(default_factory=list)

    def open(self, name: str, source: Home, target: Home | None = None) -> None:
        """Read a chunk of `source`, to be worked on and, where it is flushed, to be in `target`."""
        home, begin, end = target or source, self.chunk.begin, self.chunk.end
        if home.in_memory(begin, end):
            window = Window(home, begin, home.tensor[begin:end], False)
        else:
            window = Window(home, begin, self.turn.buffer(name, end - begin, home.dtype), True)
        if window.buffered or home is not source:
            self.reading += source.read(begin, window.tensor)
        self.windows[name] = window

    def __getitem__(self, name: str) -> Tensor:
        return self.windows[name].tensor

    def flush(self, names: Sequence[str]) -> None:
        for window in (self.windows[name] for name in names):
            if window.buffered:
                self.turn.flushing += window.home.write(window.begin, window.tensor)


class Passes:
    """Passes over units in chunks: fetch i+1 | work on i | flush i-1. One thread at a time uses one."""

    def __init__(self, policy: Tiered, *, pinned: bool) -> None:
        self._policy = policy
        self._turns = Turns(policy.depth, pinned=pinned)

    @property
    def nbytes(self) -> int:
        return self._turns.nbytes

    def run(self, numel: int, fetch: Callable[[Opened], None], work: Callable[[Opened], None]) -> None:
        """Every chunk of `numel` elements. Raises AioError and what `work` raises, with nothing under way."""
        chunks = tuple(plan_chunks(0, numel, self._policy.chunk_numel))
        plan = StepPlan(chunks, self._policy.depth, 0)
        opened: dict[int, Opened] = {}
        try:
            for fetched, at, _ in plan.rounds():
                for index in fetched:
                    turn = self._turns[index]
                    turn.empty()
                    opened[index] = Opened(chunks[index], turn)
                    fetch(opened[index])
                now = opened[at]
                for future in now.reading:
                    future.result()
                work(now)
                del opened[at]
            self._turns.empty()
        except BaseException:
            for left in opened.values():
                for future in left.reading:
                    future.exception()
            self._turns.abandon()
            raise


def add_up(
    passes: Passes,
    gradient: Home | Tensor,
    summed: Home,
    stretches: Sequence[tuple[Stretch, bool]],
    scaled: Callable[[Tensor], Tensor],
    measure: Measure,
) -> None:
    """Add a unit's gradient [shard_numel] to what is summed, or begin with it where a stretch says so (True).

    `measure` gets what is added, in parts.
    """

    def fetch(chunk: Opened) -> None:
        if isinstance(gradient, Home):
            chunk.open("grad", gradient)
        chunk.open("sum", summed)

    def work(chunk: Opened) -> None:
        at = chunk.chunk
        given = chunk["grad"] if isinstance(gradient, Home) else gradient[at.begin : at.end].to("cpu")
        for stretch, begins in stretches:
            part = stretch.within(at)
            if part is None:
                continue
            values = scaled(given[part])
            measure(stretch.fqn, values)
            if begins:
                chunk["sum"][part].copy_(values)
            else:
                chunk["sum"][part].add_(values)
        chunk.flush(["sum"])

    passes.run(summed.numel, fetch, work)


@torch.no_grad()
def apply(
    passes: Passes, jobs: Sequence[Job], rule: Rule, targets: Mapping[tuple[str, str], Home]
) -> dict[str, dict[str, Any]]:
    """One step of the rule for every stretch, with the mean of its gradients; returns their numbers by name.

    `targets[unit, name]`: where new values go, if not into the homes that they come from.
    """
    after: dict[str, dict[str, Any]] = {}
    for job in jobs:
        _apply_one(passes, job, rule, targets, after)
    return after


def _apply_one(
    passes: Passes,
    job: Job,
    rule: Rule,
    targets: Mapping[tuple[str, str], Home],
    after: dict[str, dict[str, Any]],
) -> None:
    def fetch(chunk: Opened) -> None:
        for name, home in job.homes.items():
            chunk.open(name, home, targets.get((job.key, name)))
        chunk.open("sum", job.summed)

    def work(chunk: Opened) -> None:
        given: list[tuple[Due, slice, Given]] = []
        for stretch in job.stretches:
            part = stretch.within(chunk.chunk)
            if part is not None:
                mean = chunk["sum"][part] / stretch.count
                states = {name: chunk[name][part] for name in stretch.names}
                each = Given(stretch.group, chunk["master"][part], mean, states, stretch.numbers)
                given.append((stretch, part, each))
        if given:
            rule.step([each for _, _, each in given])
        for stretch, part, each in given:
            after[stretch.fqn] = each.numbers
            for name in each.states.keys() - set(stretch.names):  # made anew
                if name not in chunk.windows:
                    home = job.homes[name] = job.new_state(name, each.states[name].dtype)
                    chunk.open(name, home)
                    for future in chunk.reading:
                        future.result()
                chunk[name][part].copy_(each.states[name])
        chunk.flush([name for name in chunk.windows if name != "sum"])

    passes.run(job.numel, fetch, work)


def move(passes: Passes, source: Home, target: Home, stretches: Sequence[Stretch]) -> None:
    """Copy these stretches, and nothing else."""

    def fetch(chunk: Opened) -> None:
        chunk.open("from", source)
        chunk.open("to", target)

    def work(chunk: Opened) -> None:
        for part in filter(None, (stretch.within(chunk.chunk) for stretch in stretches)):
            chunk["to"][part].copy_(chunk["from"][part])
        chunk.flush(["to"])

    passes.run(target.numel, fetch, work)


def show(passes: Passes, master: Home, local: Tensor, stretches: Sequence[Stretch]) -> None:
    """Masters [shard_numel] into the shard in the parameters' dtype, wherever that is."""

    def work(chunk: Opened) -> None:
        for part in filter(None, (stretch.within(chunk.chunk) for stretch in stretches)):
            at = chunk.chunk.begin
            local[at + part.start : at + part.stop].copy_(chunk["from"][part])

    passes.run(master.numel, lambda chunk: chunk.open("from", master), work)
