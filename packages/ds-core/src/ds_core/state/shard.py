"""A flat range of a tensor: what a rank owns, and what a checkpoint saves as boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ds_core.state.layout import Box, flat_range_boxes

Json = Any  # None, bool, int, float, str, list or dict of the same: what json.dumps takes without a default


@dataclass(frozen=True, slots=True)
class FlatShard:
    """Flat elements [start, start + local.numel()) of a row-major tensor of `shape`.

    `local` is 1-D and contiguous: the live memory itself, not a copy. `let_go` is there where it is a file's:
    a checkpoint then writes from it and never copies it into memory, and calls that when it has looked at
    it, so that its pages need not stay.
    """

    local: Tensor
    shape: torch.Size
    start: int
    let_go: Callable[[], object] | None = None

    def boxes(self) -> list[tuple[Box, Tensor]]:
        """((offsets, sizes), view of `local` with those sizes), in flat order."""
        found, at = [], 0
        for offsets, sizes in flat_range_boxes(self.shape, self.start, self.start + self.local.numel()):
            numel = math.prod(sizes)
            found.append(((offsets, sizes), self.local[at : at + numel].view(sizes)))
            at += numel
        return found


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """What a checkpoint says of one tensor without reading it."""

    shape: torch.Size
    dtype: torch.dtype


@runtime_checkable
class Saveable(Protocol):
    """One named part of a checkpoint: a model's owner, an optimizer, a scheduler, a sampler.

    Tensors are read back into the memory that the part itself names, so loading never holds a second copy.
    """

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """Live tensors (whole ones: equal on every rank), this rank's shards, and JSON values."""
        ...

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Where each saved tensor's bytes go on this rank; allocates what does not exist yet.

        Raises ValueError naming every tensor that is missing, unknown or of another shape, with both
        shapes, before anything is written.
        """
        ...

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Called after all targets are filled, with the JSON values."""
        ...


@runtime_checkable
class AnnouncesChange(Protocol):
    """What a part offers besides `Saveable` so that background saves need not stop training to copy it.

    By offering it, the part promises that none of its tensors changes before it has called what it was given.
    """

    def before_next_change(self, fn: Callable[[], None]) -> None:
        """Call `fn` once, right before any tensor of `state_dict` next changes; `fn` may block."""
        ...


class ChangeGate:
    """The waiting list behind `before_next_change`: an owner calls `open` where it is about to write."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def before_next_change(self, fn: Callable[[], None]) -> None:
        """Remember `fn` for the next `open`."""
        self._waiting.append(fn)

    def open(self) -> None:
        """Call everything that waits, once."""
        waiting, self._waiting = self._waiting, []
        for fn in waiting:
            fn()
