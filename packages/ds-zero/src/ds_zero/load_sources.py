"""Where a tensor's values come from: parts of files, joined, cut and turned, and read any range at a time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ds_core.state.checkpoint_reader import box_runs
from ds_core.state.layout import flat_range_boxes

_TURN_NUMEL = 1 << 20  # elements that are in memory at once while axes change places


class Source(Protocol):
    """Values that can be had in parts. All ranges are of the row-major flat order of `shape`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self, start: int, out: Tensor) -> None:
        """Elements from `start` on into `out`, 1-D and contiguous, converted to its dtype."""
        ...


def read_whole(source: Source, dtype: torch.dtype | None = None) -> Tensor:
    """All of it, in the dtype it has at the source unless another is given."""
    out = torch.empty(source.shape, dtype=dtype or source.dtype)
    source.read(0, out.view(-1))
    return out


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self.tensor.detach().reshape(-1)[start : start + out.numel()])


@dataclass(frozen=True, slots=True)
class Viewed:
    """The same elements in the same order, in another shape."""

    source: Source
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, start: int, out: Tensor) -> None:
        self.source.read(start, out)


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows [low, high) of dimension `dim`."""

    source: Source
    dim: int
    low: int
    high: int

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.source.shape
        return (*whole[: self.dim], self.high - self.low, *whole[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, start: int, out: Tensor) -> None:
        inner = math.prod(self.shape[self.dim + 1 :])
        mine, whole = (self.high - self.low) * inner, self.source.shape[self.dim] * inner
        at, end = start, start + out.numel()
        while at < end:
            row, within = divmod(at, mine)
            numel = min(mine - within, end - at)
            piece = out[at - start : at - start + numel]
            self.source.read(row * whole + self.low * inner + within, piece)
            at += numel


@dataclass(frozen=True, slots=True)
class Joined:
    """Parts one after another along dimension `dim`."""

    parts: tuple[Source, ...]
    dim: int
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = (math.prod(part.shape[self.dim :]) for part in self.parts)
        object.__setattr__(self, "_ends", tuple(accumulate(rows)))

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.parts), *first[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.parts[0].dtype
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    def read(self, start: int, out: Tensor) -> None:
        at, end = start, start + out.numel()
        while at < end:
            row, within = divmod(at, self._ends[-1])
            index = bisect_right(self._ends, within)
            begin = self._ends[index - 1] if index else 0
            numel = min(self._ends[index] - within, end - at)
            piece = out[at - start : at - start + numel]
            self.parts[index].read(row * (self._ends[index] - begin) + within - begin, piece)
            at += numel


@dataclass(frozen=True, slots=True)
class Turned:
    """Dimensions in another order, as `torch.permute` puts them."""

    source: Source
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape[dim] for dim in self.dims)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, start: int, out: Tensor) -> None:
        for begin in range(0, out.numel(), _TURN_NUMEL):
            piece = out[begin : begin + _TURN_NUMEL]
            at = 0
            for offsets, sizes in flat_range_boxes(self.shape, start + begin, start + begin + piece.numel()):
                numel = math.prod(sizes)
                piece[at : at + numel] = self._box(offsets, sizes, out.dtype)
                at += numel

    def _box(self, offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A box of the turned tensor, flat: the box that it is at the source, read run by run and turned."""
        place = [self.dims.index(dim) for dim in range(len(self.dims))]
        low, extent = [offsets[p] for p in place], [sizes[p] for p in place]
        box = torch.empty(extent, dtype=dtype)
        at, flat = 0, box.view(-1)
        for begin, numel in box_runs(low, extent, self.source.shape):
            self.source.read(begin, flat[at : at + numel])
            at += numel
        return box.permute(self.dims).reshape(-1)
