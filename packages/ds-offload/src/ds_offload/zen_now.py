"""Selected elements: copies of their masters and states on the device, updated at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_core.train.holdings import Piece
from ds_offload.zen_later import Measure
from ds_offload.zen_rule import Given, Rule
from ds_offload.zen_select import Part
from ds_offload.zen_view import View, gradient_of

Scaled = Callable[[Tensor, torch.dtype], Tensor]


@dataclass(slots=True)
class Held:
    """Of one piece: [part.count] each, on the device."""

    piece: Piece
    part: Part
    master: Tensor
    states: dict[str, Tensor]


class Selected:
    """Gathered from their homes when they are first asked for, and the newest values until they go home."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._held: dict[str, Held] = {}

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(
            held.master.nbytes + sum(state.nbytes for state in held.states.values())
            for held in self._held.values()
        )

    def hold(self, piece: Piece) -> Held:
        """Here from now on."""
        held = self._held.get(piece.fqn)
        if held is None:
            part, unit = self._view.part(piece), piece.unit
            where = slice(*piece.overlap.local)
            homes = {
                name: self._view.home(f"{unit.key}/{name}")
                for name in ("master", *self._view.cut_states(piece))
            }
            taken = {name: part.take(home.tensor[where]).to(unit.device) for name, home in homes.items()}
            for home in homes.values():
                home.forget()
            held = self._held[piece.fqn] = Held(piece, part, taken.pop("master"), taken)
        return held

    def rest(self, piece: Piece) -> bool:
        """Is there anything of this piece that is not selected?"""
        held = self._held.get(piece.fqn)
        part = self._view.part(piece) if held is None else held.part
        return part.count < part.numel

    def update(self, pieces: Sequence[Piece], scaled: Scaled, measure: Measure) -> None:
        """One step by these pieces' gradients. `measure` gets the selected ones of each."""
        view = self._view
        group_of = view.group_of()
        given: list[tuple[Piece, Given]] = []
        for piece in pieces:
            held, gradient = self.hold(piece), gradient_of(piece)
            assert gradient is not None
            mine = scaled(held.part.take(gradient).to(piece.unit.device), held.master.dtype)
            measure(piece.fqn, mine)
            if held.part.count:
                group = group_of[id(piece.param)]
                given.append((piece, Given(group, held.master, mine, held.states, view.numbers(piece))))
        Rule(view.optimizer).step([each for _, each in given])
        for piece, each in given:
            view.optimizer.state[piece.param].update(each.numbers)
            self.lay_over(piece)

    def lay_over(self, piece: Piece) -> None:
        """Into the shard that the model sees."""
        held = self._held.get(piece.fqn)
        if held is None:
            return
        unit = piece.unit
        home = None if unit.shard_key is None else self._view.store.home_of(unit.shard_key)
        if home is not None:
            home.settle()
        held.part.put(unit.local[slice(*piece.overlap.local)], held.master)
        if home is not None:
            home.forget()

    def put_back(self) -> None:
        """Home, and no longer here."""
        state = self._view.optimizer.state
        for held in self._held.values():
            piece, where = held.piece, slice(*held.piece.overlap.local)
            home = self._view.home(f"{piece.unit.key}/master")
            held.part.put(home.tensor[where], held.master)
            home.forget()
            for name, values in held.states.items():
                room = self._view.states.home(piece.unit, name, values.dtype)
                room.settle()
                held.part.put(room.tensor[where], values)
                room.forget()
                if name not in state[piece.param]:
                    state[piece.param][name] = room.tensor[where].view(piece.param.shape)
        self._held = {}

    def drop(self) -> None:
        """Of no use any more."""
        self._held = {}
