"""Checkpoint parts for tests and benchmarks: tensors cut flat over ranks, whole ones, and JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_core.state.shard import ChangeGate, FlatShard, Json, SavedTensor


def pattern(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The whole tensor that `name` stands for: the same on every rank and at every world size."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1009 + seed)
    numbers = torch.randint(-(2**20), 2**20, (math.prod(shape),), generator=generator)
    return numbers.to(dtype).view(tuple(shape))


def even_cut(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Elements [start, end) of `rank`: ceil(numel / world) each, nothing for ranks that come too late."""
    each = -(-numel // world)
    return min(numel, rank * each), min(numel, (rank + 1) * each)


class CutPart:
    """A Saveable whose tensors are cut flat over `world` ranks, or are whole on each of them.

    `fill` makes rank-independent contents from `pattern`; without it everything is zero, ready for a load.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rank: int = 0,
        world: int = 1,
        *,
        whole: bool = False,
        dtype: torch.dtype = torch.float32,
        values: Mapping[str, Json] | None = None,
        seed: int | None = None,
    ) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.values: dict[str, Json] = dict(values or {})
        self.held: dict[str, Tensor | FlatShard] = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(shape, dtype=dtype) if seed is None else pattern(name, shape, dtype, seed)
            start, end = even_cut(full.numel(), rank, world)
            self.held[name] = full if whole else FlatShard(full.view(-1)[start:end].clone(), shape, start)

    def memory(self, name: str) -> Tensor:
        """This rank's memory of a tensor."""
        held = self.held[name]
        return held.local if isinstance(held, FlatShard) else held

    def state_dict(self) -> dict[str, Any]:
        """Live memory and values."""
        return {**self.held, **self.values}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """The same memory.

        Raises: ValueError naming missing and unknown tensors, and both shapes of those that differ.
        """
        wrong = [f"{name}: missing in the checkpoint" for name in self.shapes if name not in saved]
        wrong += [f"{name}: unknown here" for name in saved if name not in self.shapes]
        wrong += [
            f"{name}: shape {list(shape)} here, {list(saved[name].shape)} in the checkpoint"
            for name, shape in self.shapes.items()
            if name in saved and saved[name].shape != shape
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return dict(self.held)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Take the values."""
        self.values = dict(values)

    def wrong(self, seed: int, dtype: torch.dtype) -> list[str]:
        """Names of the tensors whose elements here are not those of `seed`, bit for bit."""
        found = []
        for name, shape in self.shapes.items():
            held, full = self.held[name], pattern(name, shape, dtype, seed)
            if isinstance(held, FlatShard):
                full = full.view(-1)[held.start : held.start + held.local.numel()]
            if not torch.equal(self.memory(name).to(dtype), full):
                found.append(name)
        return found


class SteadyPart(CutPart):
    """A CutPart that changes only in `change`, and says so: background saves copy it in the background."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], rank: int = 0, world: int = 1, **more: Any
    ) -> None:
        super().__init__(shapes, rank, world, **more)
        self._gate = ChangeGate()
        self.before_next_change = self._gate.before_next_change

    def change(self, by: float = 1.0) -> None:
        """What an optimizer's step does: wait for who still reads, then write."""
        self._gate.open()
        for name in self.shapes:
            self.memory(name).add_(by)
