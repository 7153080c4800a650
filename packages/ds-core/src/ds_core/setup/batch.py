"""The batch equation: any two of three sizes give the third, and a contradiction is shown whole (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_core.ground.settings import Origin
from ds_core.setup.config import Problem

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATE = "gradient_accumulation_steps"
Sizes = Mapping[str, tuple[int, Origin]]


@dataclass(frozen=True, slots=True)
class Batch:
    """train = micro x accumulate x ranks."""

    train: int
    micro: int
    accumulate: int


def solve_batch(given: Sizes, world: int, world_origin: Origin) -> tuple[Batch | None, Problem | None]:
    """The three sizes, from those of them that were given; else the problem with the equation printed."""
    train, micro, accumulate = (
        given[name][0] if name in given else None for name in (TRAIN, MICRO, ACCUMULATE)
    )
    equation = _equation(given, world, world_origin)
    if train is None and micro is None:
        need = f"give {TRAIN} or {MICRO} (any two of the three give the third)"
        return None, Problem(TRAIN, f"not enough to know the batch sizes: {equation}; {need}")
    if train is None:
        assert micro is not None
        accumulate = accumulate or 1
        return Batch(micro * accumulate * world, micro, accumulate), None
    if micro is not None and accumulate is not None:
        if train == micro * accumulate * world:
            return Batch(train, micro, accumulate), None
        right = micro * accumulate * world
        return None, Problem(
            TRAIN, f"the batch sizes contradict each other: {equation}, but the right side is {right};"
            " change one of them, or leave one out to have it derived"
        )  # fmt: skip
    known = (micro or accumulate or 1) * world
    if train % known:
        return None, Problem(
            TRAIN, f"the batch sizes do not divide: {equation}, and {train} is no multiple of {known};"
            f" the nearest that are: {max(known, train // known * known)} and {-(-train // known) * known}"
        )  # fmt: skip
    if micro is not None:
        return Batch(train, micro, train // known), None
    return Batch(train, train // known, accumulate or 1), None


def _equation(given: Sizes, world: int, world_origin: Origin) -> str:
    def term(name: str) -> str:
        return f"{name} {given[name][0]} ({given[name][1]})" if name in given else f"{name} ?"

    return f"{term(TRAIN)} = {term(MICRO)} x {term(ACCUMULATE)} x {world} ranks ({world_origin})"
