"""Work: the update of one unit, with everything that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_offload.home import Home


class _InHome:
    """In place of a state that has a number for every element: its numbers are in a home."""


IN_HOME: Final = _InHome()


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat tensor [shard_numel], and the home that it shows, if it does."""

    tensor: Tensor
    home: Home | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """One unit's pieces with a gradient, as they were found when this was made; nothing is looked up later.

    `numbers[id(piece.param)]`: the states of each piece by name, in the optimizer's order, `IN_HOME` for
    those in `states`.
    """

    unit: FlatUnit
    pieces: tuple[Piece, ...]
    master: Flat
    gradient: Flat
    states: Mapping[str, Flat]
    numbers: Mapping[int, Mapping[str, Any]]
    whole: bool  # the optimizer must see the parameters whole

    @property
    def bytes_per_element(self) -> int:
        """Of everything that passes through a chunk's buffers."""
        unit = self.unit
        dtypes = [unit.master_dtype, unit.grad_dtype, *(flat.tensor.dtype for flat in self.states.values())]
        dtypes += [unit.dtype] if unit.separate_master else []
        return sum(dtype.itemsize for dtype in dtypes)

    @property
    def cuts(self) -> list[int] | None:
        """The only places where the shard may be cut; None: anywhere."""
        if not self.whole:
            return None
        return [part.local[1] for part in self.unit.layout.overlaps(self.unit.rank)]
