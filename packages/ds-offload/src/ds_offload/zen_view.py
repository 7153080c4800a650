"""What ZenFlow sees of an optimizer: its pieces off the device, what is selected of them, and their homes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakMethod, ref

from torch import Tensor

from ds_core.state.store import Kind
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer
from ds_offload.home import Home
from ds_offload.policy import Split
from ds_offload.states import UnitStates, is_cut
from ds_offload.step import UpdateStore
from ds_offload.volume import Volume
from ds_offload.zen_later import Stretch
from ds_offload.zen_select import Part, columns_of
from ds_offload.zen_state import Progress


class FlowStore(UpdateStore, Protocol):
    """What is asked of the store."""

    splits: dict[Kind, Split]
    volume: Volume | None
    lookers: list[WeakMethod[Any]]


class View:
    """Looks, and changes nothing. `progress` is what all parts of one ZenFlowUpdate go by."""

    def __init__(self, store: FlowStore, sharded: ShardedOptimizer, progress: Progress) -> None:
        self.store, self.progress = store, progress
        self._sharded = ref(sharded)

    @property
    def sharded(self) -> ShardedOptimizer:
        sharded = self._sharded()
        assert sharded is not None
        return sharded

    @property
    def optimizer(self) -> Any:
        return self.sharded.optimizer

    @property
    def states(self) -> UnitStates:
        return UnitStates(self.store, self.sharded)

    # -- pieces --------------------------------------------------------------------------------------------

    def has(self, unit: FlatUnit) -> bool:
        """Is the unit's master, or any state of it, off the device?"""
        return unit.trainable and not self.store.stays(f"{unit.key}/master", unit.layout.shard_numel)

    def pieces(self) -> list[Piece]:
        return [piece for piece in self.sharded.pieces if self.has(piece.unit)]

    def slots(self) -> dict[str, tuple[FlatUnit, int]]:
        """Parameters with columns that this optimizer trains, on whichever rank they are, by name."""
        return {
            unit.layout.slots[index].fqn: (unit, index)
            for unit, indices in self.sharded.slots.items()
            if self.has(unit)
            for index in indices
            if columns_of(unit.layout.slots[index].shape)
        }

    def columns(self, piece: Piece) -> Tensor | bool | None:
        """Which are selected; True for all, None where nothing was chosen yet."""
        if columns_of(piece.overlap.slot.shape) == 0:
            return True
        return self.progress.selection.get(piece.fqn)

    def part(self, piece: Piece) -> Part:
        """The selected elements of a piece."""
        chosen = self.columns(piece)
        only = chosen if isinstance(chosen, Tensor) else None
        shape = piece.overlap.slot.shape
        return Part(piece.overlap.begin, piece.param.numel(), columns_of(shape), only)

    # -- what is kept of them ------------------------------------------------------------------------------

    def home(self, key: str) -> Home:
        """Settled, for plain looks. (The store's `home` is for others, and tells of their looks.)"""
        home = self.store.home_of(key)
        assert home is not None, key
        home.settle()
        return home

    def cut_states(self, piece: Piece) -> list[str]:
        """Names of the states with a number for every element."""
        state = self.optimizer.state.get(piece.param, {})
        return [name for name, value in state.items() if is_cut(value, piece.param)]

    def numbers(self, piece: Piece) -> dict[str, Any]:
        """Copies of its other states."""
        state = self.optimizer.state.get(piece.param, {})
        found = {name: value for name, value in state.items() if not is_cut(value, piece.param)}
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in found.items()}

    def group_of(self) -> dict[int, int]:
        """The number of each piece's group, by the id of its parameter."""
        groups = enumerate(self.optimizer.param_groups)
        return {id(param): index for index, group in groups for param in group["params"]}

    # -- ranks ---------------------------------------------------------------------------------------------

    def total(self, values: Tensor, about: str) -> Tensor:
        """Summed over the ranks that cut parameters between them. Collective where they are cut."""
        owner = self.sharded.owner
        values = values.to(owner.device)
        if owner.sharded and owner.comm.world > 1:
            owner.comm.all_reduce(values, about=about).wait()
        return values.cpu()


def gradient_of(piece: Piece) -> Tensor | None:
    """[piece], flat, wherever it lives; None where this step has none."""
    unit = piece.unit
    if unit.gradient is None or not unit.has_grad[piece.overlap.index]:
        return None
    return unit.gradient[slice(*piece.overlap.local)]


def stretch_of(piece: Piece) -> Stretch:
    return Stretch(piece.fqn, *piece.overlap.local)


def by_unit(pieces: Sequence[Piece]) -> Mapping[FlatUnit, list[Piece]]:
    found: dict[FlatUnit, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.unit, []).append(piece)
    return found
