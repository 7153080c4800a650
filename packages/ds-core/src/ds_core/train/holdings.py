"""What an optimizer holds of a model: which parameters its groups are for, and this rank's piece of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.ground.texts import exchange
from ds_core.state.layout import Overlap
from ds_core.state.owner import FlatOwner
from ds_core.state.replan import Place
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit


@dataclass(slots=True)
class Piece:
    """The part of one parameter that this rank updates."""

    unit: FlatUnit
    overlap: Overlap
    param: nn.Parameter  # a view of the unit's master

    @property
    def fqn(self) -> str:
        return self.overlap.slot.fqn

    def cut(self, value: Any) -> Any:
        """State of the whole parameter, cut as its shard is; any other state as it is."""
        if not isinstance(value, Tensor) or value.shape != self.overlap.slot.shape or value.dim() == 0:
            return value
        begin = self.overlap.begin
        return value.reshape(-1)[begin : begin + self.param.numel()].clone().view(self.param.shape)


class Holdings:
    """Keeps the groups of one optimizer pointing at this rank's shards of the owner's present units.

    `members` are the model's own parameters, group by group, frozen ones too: a parameter that thaws is back
    in its group, with the state that it had. `pieces` are what stands for them in the groups, and of frozen
    ones with state what stands beside. `slots`: what the groups train, on whichever rank it is.
    """

    def __init__(self, optimizer: Optimizer, owner: FlatOwner, cut: Callable[[], None]) -> None:
        self.optimizer, self.owner = optimizer, owner
        self._when_cut = cut
        self.members: list[list[nn.Parameter]] = []
        self.pieces: list[Piece] = []
        self.slots: dict[FlatUnit, list[int]] = {}
        self._counts: list[int] = []
        self._agreed: dict[tuple[int, int], dict[str, list[Json]]] = {}  # (unit, slot) -> name -> what
        self._carried: dict[int, dict[str, Any]] = {}  # id of a parameter -> its states here
        self._swap()

    @property
    def trained(self) -> list[Piece]:
        """Without those of frozen parameters, whose states rest until they train again."""
        return [piece for piece in self.pieces if piece.unit.trainable]

    def look(self) -> None:
        """Before states are read: a store that keeps newer ones elsewhere hears of it when masters are asked
        for, and puts masters and states where they belong.
        """
        for unit in {piece.unit for piece in self.trained}:
            unit.values()

    # -- groups --------------------------------------------------------------------------------------------

    def regrouped(self) -> bool:
        """Was a group added, or a parameter to a group?"""
        return [len(group["params"]) for group in self.optimizer.param_groups] != self._counts

    def describe(self) -> Json:
        """The names of every group's parameters."""
        names = {id(p): name for name, p in self.owner.model.named_parameters(remove_duplicate=False)}
        return [[names.get(id(p), "left the model") for p in group] for group in self._members_now()]

    def _members_now(self) -> list[list[nn.Parameter]]:
        """Known members, and after them what the user put beside the shards.

        Raises ValueError when there are fewer groups than before.
        """
        groups = self.optimizer.param_groups
        if len(groups) < len(self.members):
            raise ValueError(
                f"the optimizer had {len(self.members)} parameter groups and has {len(groups)}: groups of a "
                "sharded optimizer are added, not removed; freeze their parameters instead"
            )
        shards = {id(piece.param) for piece in self.pieces}
        known = [*self.members, *[[] for _ in groups[len(self.members) :]]]
        return [
            [*old, *(param for param in group["params"] if id(param) not in shards)]
            for old, group in zip(known, groups, strict=True)
        ]

    def _swap(self) -> None:
        """Groups get this rank's shards in place of parameters; states go with them."""
        optimizer = self.optimizer
        before = {(id(piece.unit), piece.overlap.index): piece for piece in self.pieces}
        known = {id(param) for group in self.members for param in group}
        members, unused = self._members_now(), dict(before)
        self.members, self.pieces, self.slots = [], [], {}
        seen: set[int] = set()
        for group, params in zip(optimizer.param_groups, members, strict=True):
            held: list[nn.Parameter] = []
            shards: list[nn.Parameter] = []
            for param in params:
                place = self._place(param, known)
                if place is None:
                    continue
                unit, index = place
                held.append(unit.params[index])  # a meta model was given new parameters
                if id(held[-1]) in seen:
                    raise ValueError(f"{unit.layout.slots[index].fqn} is in the optimizer's groups twice")
                seen.add(id(held[-1]))
                if unit.trainable:
                    self.slots.setdefault(unit, []).append(index)
                state = optimizer.state.pop(param, {}) or self._carried.get(id(param), {})
                piece = unused.pop((id(unit), index), None)
                piece = self._piece(unit, index, piece, state)
                if piece is not None and unit.trainable:
                    shards.append(piece.param)
            group["params"] = shards
            self.members.append(held)
        for piece in unused.values():
            optimizer.state.pop(piece.param, None)
        self._counts = [len(group["params"]) for group in optimizer.param_groups]
        self._carried, self._agreed = {}, {}

    def _place(self, param: nn.Parameter, known: set[int]) -> tuple[FlatUnit, int] | None:
        """None for a known parameter that left the model, and for a frozen one that never was in it."""
        if id(param) in known or not param.requires_grad:
            with contextlib.suppress(LookupError):
                return self.owner.place(param)
            return None
        return place_of(self.owner, param)

    def _piece(self, unit: FlatUnit, index: int, old: Piece | None, state: dict[str, Any]) -> Piece | None:
        """This rank's piece of a slot, with its state; of a frozen one only if there is state to keep."""
        overlap = unit.layout.overlap(unit.rank, index)
        if overlap is None:
            return None
        if old is not None:
            piece = replace(old, overlap=overlap)  # the unit stayed; its names may be others
        elif not unit.trainable and not state:
            return None
        else:
            view = unit.values()[slice(*overlap.local)]
            if unit.cut == "whole" or not self.owner.sharded:
                view = view.view(overlap.slot.shape)
            piece = Piece(unit, overlap, nn.Parameter(view, requires_grad=unit.trainable))
        if state:
            self.optimizer.state[piece.param] = {name: piece.cut(value) for name, value in state.items()}
        self.pieces.append(piece)
        return piece

    # -- units are cut anew --------------------------------------------------------------------------------

    def leave(self, units: Sequence[FlatUnit]) -> None:
        """Agree on which states there are of these units' parameters: a rank may hold none of one.

        Collective where units are cut, over the ranks that cut them between them.
        """
        self.look()
        number = {id(unit): at for at, unit in enumerate(units)}
        mine = [
            [number[id(piece.unit)], piece.overlap.index, name, *_about(name, value, piece)]
            for piece in self.pieces
            if id(piece.unit) in number
            for name, value in self.optimizer.state.get(piece.param, {}).items()
        ]
        tables, comm = [mine], self.owner.gather_comm
        if any(unit.layout.world > 1 for unit in units):
            texts = exchange(comm, json.dumps(mine), device=self.owner.device, about="optimizer states")
            tables = [json.loads(text) for text in texts]
        self._agreed = {}
        asides: list[tuple[int, FlatUnit, int, str, list[Json]]] = []
        for rank, table in enumerate(tables):
            for at, index, name, *about in table:
                states = self._agreed.setdefault((id(units[at]), index), {})
                if name not in states:
                    states[name] = about
                    if about[0] != "cut":
                        asides.append((rank, units[at], index, name, about))
        for root, unit, index, name, about in asides:
            state = self._carried.setdefault(id(unit.params[index]), {})
            state[name] = self._aside(root, unit, index, name, about, alone=len(tables) == 1)

    def _aside(
        self, root: int, unit: FlatUnit, index: int, name: str, about: list[Json], *, alone: bool
    ) -> Any:
        """A state of no shard's shape, from the first rank that has it."""
        kind, *rest = about
        if kind == "plain":
            return rest[0]
        dtype, device, shape, value = rest
        where = torch.device("cpu") if device == "cpu" else self.owner.device
        if kind == "number":
            return torch.full(shape, value, dtype=getattr(torch, dtype), device=where)
        held = next((p for p in self.pieces if p.unit is unit and p.overlap.index == index), None)
        mine = None if held is None else self.optimizer.state.get(held.param, {}).get(name)
        if alone and mine is not None:
            return mine
        wire = torch.empty(shape, dtype=getattr(torch, dtype), device=self.owner.device)
        if root == self.owner.gather_comm.rank and mine is not None:
            wire.copy_(mine)
        self.owner.gather_comm.broadcast(wire, root=root, about=f"the state {name}").wait()
        return wire.to(where)

    def shards_of(self, unit: FlatUnit) -> Sequence[tuple[str, Tensor]]:
        """Every state that has its parameter's shape, as [shard_numel]."""
        found: dict[str, str] = {}
        for (owner, _), states in self._agreed.items():
            if owner == id(unit):
                found |= {name: about[1] for name, about in states.items() if about[0] == "cut"}
        pieces = [piece for piece in self.pieces if piece.unit is unit]
        shards = []
        for name in sorted(found):
            dtype = getattr(torch, found[name])
            shard = torch.zeros(unit.layout.shard_numel, dtype=dtype, device=unit.device)
            for piece in pieces:
                value = self.optimizer.state.get(piece.param, {}).get(name)
                if isinstance(value, Tensor) and value.shape == piece.param.shape:
                    shard[slice(*piece.overlap.local)] = value.reshape(-1)
            shards.append((name, shard))
        return shards

    def put(self, name: str, old: Place, new: Place, value: Tensor) -> None:
        """This rank's part of one parameter's state."""
        about = self._agreed.get((id(old.unit), old.index), {}).get(name)
        part = new.unit.layout.overlap(new.unit.rank, new.index)
        if about is None or about[0] != "cut" or part is None:
            return
        here = value[part.begin : part.begin + part.local[1] - part.local[0]]
        here = here.to(getattr(torch, about[1]), copy=True)
        if new.unit.cut == "whole" or not self.owner.sharded:
            here = here.view(part.slot.shape)
        self._carried.setdefault(id(new.unit.params[new.index]), {})[name] = here

    def cut_anew(self, stayed: Set[int]) -> None:
        """The owner has its new units."""
        self._carried = {key: state for key, state in self._carried.items() if key in stayed}
        self._swap()
        self._when_cut()


def place_of(owner: FlatOwner, param: Tensor) -> tuple[FlatUnit, int]:
    """Raises ValueError for a parameter that an optimizer holds and the model does not."""
    try:
        return owner.place(param)
    except LookupError:
        raise ValueError(
            f"the optimizer holds a parameter of shape {tuple(param.shape)} that is not in the model; "
            "build it from model.parameters()"
        ) from None


def _about(name: str, value: Any, piece: Piece) -> list[Json]:
    """How a state travels. Raises TypeError for one that cannot."""
    if value is None or isinstance(value, bool | int | float | str):
        return ["plain", value]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the optimizer keeps {name!r} of {piece.fqn} as {type(value).__name__}, which cannot move to "
            "another rank: keep it as a tensor or a number"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if value.dim() > 0 and value.shape == piece.param.shape:
        return ["cut", dtype]
    number = value.item() if value.numel() == 1 else None
    return ["number" if number is not None else "aside", dtype, value.device.type, list(value.shape), number]
