"""Where the optimizer's states of units off the device live, and how they show in `optimizer.state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer, whole_groups
from ds_offload.home import Home
from ds_offload.work import IN_HOME, Flat, Work


class Homes(Protocol):
    """What is asked of the store."""

    def home_of(self, key: str) -> Home | None: ...
    def make_home(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Home: ...


def is_cut(value: Any, param: Tensor) -> bool:
    """Is this a state with a number for every element of the parameter?"""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == param.shape


class UnitStates:
    """One home for each unit and state, of which every piece has its part; numbers stay with the pieces."""

    def __init__(self, homes: Homes, sharded: ShardedOptimizer) -> None:
        self._homes, self._sharded = homes, sharded

    def home(self, unit: FlatUnit, name: str, dtype: torch.dtype) -> Home:
        """Made when it is first asked for. Raises ValueError when a unit's pieces disagree on the dtype."""
        key = f"{unit.key}/{name}"
        found = self._homes.home_of(key)
        if found is None:
            found = self._homes.make_home(key, unit.layout.shard_numel, dtype, unit.device)
        elif found.dtype != dtype:
            raise ValueError(
                f"{name} of {unit.key} lives in {found.dtype} and another parameter of that unit has it in "
                f"{dtype}: give both groups the same state dtype"
            )
        return found

    def room(self, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
        """The part of one piece, in its shape."""
        home = self.home(piece.unit, name, dtype)
        return home.tensor[slice(*piece.overlap.local)].view(piece.param.shape)

    def work(self, unit: FlatUnit, pieces: Sequence[Piece]) -> Work:
        """The update of these pieces, as everything is now. The unit has a gradient."""
        assert unit.gradient is not None
        key, state = unit.key, self._sharded.optimizer.state
        states: dict[str, Flat] = {}
        numbers: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            mine = numbers[id(piece.param)] = {}
            for name, value in state.get(piece.param, {}).items():
                if is_cut(value, piece.param):
                    home = self._homes.home_of(f"{key}/{name}")
                    if home is not None:
                        states[name] = Flat(home.tensor, home)
                    mine[name] = IN_HOME
                else:
                    mine[name] = value.clone() if isinstance(value, Tensor) else value
        master = self._homes.home_of(f"{key}/master")
        return Work(
            unit,
            tuple(pieces),
            Flat(unit.values().detach()) if master is None else Flat(master.tensor, master),
            _shown(unit.gradient, self._homes.home_of(f"{key}/grad")),
            states,
            numbers,
            unit.cut == "whole" or self._seen_whole(pieces),
        )

    def _seen_whole(self, pieces: Sequence[Piece]) -> bool:
        """Must the optimizer see any of these whole, also where nothing cuts them: one rank, stage 0?"""
        optimizer = self._sharded.optimizer
        chosen = whole_groups(optimizer)
        whole = {id(p) for group in optimizer.param_groups if id(group) in chosen for p in group["params"]}
        return any(id(piece.param) in whole for piece in pieces)

    def is_home(self, piece: Piece, name: str, value: Tensor) -> bool:
        """Is this state of a piece where it belongs?"""
        home = self._homes.home_of(f"{piece.unit.key}/{name}")
        at = piece.overlap.local[0] * value.element_size()
        return home is not None and home.tensor.data_ptr() + at == value.data_ptr()

    def bring_home(self, pieces: Sequence[Piece]) -> None:
        """States that are in memory of their own (units were cut anew) move to where they belong."""
        for piece in pieces:
            state = self._sharded.optimizer.state.get(piece.param, {})
            for name, value in state.items():
                if is_cut(value, piece.param):
                    room = self.room(piece, name, value.dtype)
                    if room.data_ptr() != value.data_ptr():
                        room.copy_(value)
                        state[name] = room

    def show(self, piece: Piece, after: Mapping[str, Any]) -> None:
        """`optimizer.state` of a stepped piece. `after`: its states by name, None for what is in a home."""
        if not after:
            return
        state = self._sharded.optimizer.state[piece.param]
        for name, value in after.items():
            if value is not None:
                state[name] = value
            elif name not in state:
                home = self._homes.home_of(f"{piece.unit.key}/{name}")
                part = slice(*piece.overlap.local)
                state[name] = None if home is None else home.tensor[part].view(piece.param.shape)


def _shown(tensor: Tensor, home: Home | None) -> Flat:
    same = home is not None and tensor.data_ptr() == home.tensor.data_ptr()
    return Flat(tensor, home if same else None)
