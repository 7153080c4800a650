"""A model changed its mind: its units are cut anew, and every value goes where it belongs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import is_
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from ds_core.ground.texts import exchange
from ds_core.ground.wire import Communicator
from ds_core.state.absent import rename_absent
from ds_core.state.factory import UnitFactory
from ds_core.state.hooks import in_backward
from ds_core.state.reduce import GradReducer
from ds_core.state.shard import ChangeGate, Json
from ds_core.state.store import Store
from ds_core.state.structure import Structure
from ds_core.state.unit import FlatUnit, Whole, gather_shards
from ds_core.state.units import UnitPlan

_CHANGED = "what changed"


class Follower(Protocol):
    """Whoever keeps something beside each shard: an optimizer its states, an average its values.

    Told of a change in this order: `leave`, `shards_of` and `put` for each unit that goes, `cut_anew`.
    """

    def regrouped(self) -> bool:
        """Did the user change what this follower is for (parameter groups)? Local and cheap."""
        ...

    def describe(self) -> Json:
        """What all ranks must agree on before anything moves."""
        ...

    def leave(self, units: Sequence[FlatUnit]) -> None:
        """These units go: agree with the other ranks on what is kept of them. Collective."""
        ...

    def shards_of(self, unit: FlatUnit) -> Sequence[tuple[str, Tensor]]:
        """What is kept of a unit as [shard_numel] tensors, under the same names on every rank."""
        ...

    def put(self, name: str, old: Place, new: Place, value: Tensor) -> None:
        """The whole value of one parameter in one of these; each rank keeps its part."""
        ...

    def cut_anew(self, stayed: Set[int]) -> None:
        """The owner has its new units: swap in the shards of those. `stayed`: ids of the parameters in them
        that were in others, of the same shape.
        """
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """A slot of a unit."""

    unit: FlatUnit
    index: int


class Changing(Protocol):
    """What replanning asks of the owner."""

    model: nn.Module
    units: list[FlatUnit]
    reducer: GradReducer
    control: Communicator
    gather_comm: Communicator
    factory: UnitFactory
    changes: ChangeGate
    store: Store
    depth: int

    def place(self, param: Tensor) -> tuple[FlatUnit, int]: ...
    def settle(self) -> None: ...
    def take_from_first(self, tensor: Tensor, about: str = "") -> None: ...
    def make_real(self, units: Sequence[FlatUnit]) -> None: ...
    def reconnect(self, units: list[FlatUnit], leaving: Sequence[nn.Parameter]) -> None: ...


class Replanner:
    """Notices that the owner's model changed, and moves everything to units of the new structure.

    Looked at before each forward of the root and before gradients are final, without any communication. A
    change is acted on at once, after all ranks have compared what they saw. A parameter that was only frozen
    keeps its place until its optimizer has stepped past it (two networks that train in turns freeze each
    other all the time), and as long as it has a gradient, which a step would still apply.
    """

    def __init__(self, owner: Changing) -> None:
        self._owner = owner
        self.followers: list[weakref.ref[Follower]] = []
        self._structure = Structure(owner.model, owner.units)
        self._frozen: tuple[nn.Parameter, ...] = ()
        self._stepped_past: set[int] = set()
        self._blocks = 0
        owner.reducer.changed_elsewhere = self._explain

    # -- when ----------------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """Collective when something changed."""
        look = self._structure.look()
        self._frozen = look.frozen
        self._stepped_past &= {id(param) for param in look.frozen}
        if look.changed or self._regrouped() or any(self._may_move(param) for param in look.frozen):
            self.replan()

    def before_drain(self) -> None:
        """Gradients are about to be final: those of parameters that are new must be among them."""
        between = self._owner.depth == 0 and not in_backward()
        if between and (self._structure.look().changed or self._regrouped()):
            self.replan()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """What changes inside is taken in when the outermost of these blocks has ended well."""
        self._blocks += 1
        try:
            yield
        finally:
            self._blocks -= 1
        if not self._blocks:
            self.before_drain()

    def stepped(self, groups: Iterable[Sequence[nn.Parameter]]) -> None:
        """An optimizer that holds these parameters has stepped."""
        if self._frozen:
            ids = {id(param) for group in groups for param in group}
            self._stepped_past |= {id(p) for p in self._frozen if id(p) in ids and not p.requires_grad}

    def _regrouped(self) -> bool:
        return any(follower.regrouped() for follower in self._following())

    def _following(self) -> list[Follower]:
        found = [entry() for entry in self.followers]
        return [follower for follower in found if follower is not None]

    def _may_move(self, param: nn.Parameter) -> bool:
        unit, index = self._owner.place(param)
        return id(param) in self._stepped_past and not unit.has_grad[index]

    # -- how -----------------------------------------------------------------------------------------------

    def replan(self) -> None:
        """Cut units anew where the model is not what they were cut for. Collective.

        Masters, reduced gradients and optimizer states of parameters that stay move as they are, one unit
        whole at a time; new parameters, and those whose `.data` was replaced, take rank 0's values; those
        that left the model become plain parameters with their values. Raises RuntimeError inside a forward or
        a backward, and where ranks changed the model differently.
        """
        owner = self._owner
        if in_backward() or owner.depth > 0:
            raise RuntimeError(
                "the model's parameters changed while it was running; change them between two steps"
            )
        if self._blocks:
            raise RuntimeError(
                "the model's parameters changed inside `with ds_zero.gather(...):`; leave the block, which "
                "takes the changes in, before the model runs or is saved"
            )
        owner.reducer.announce()
        stray = self._compare()
        owner.reducer.drain()
        owner.settle()
        owner.changes.open()
        with torch.no_grad():
            self._move()
        if stray:
            self._take_stray()
        self._structure = Structure(owner.model, owner.units)
        self._frozen, self._stepped_past = (), set()
        owner.reducer.changed_elsewhere = self._explain

    def _move(self) -> None:
        owner, known = self._owner, {id(module) for module in self._structure.modules}
        units, made = self._match()
        kept = {id(unit) for unit in units} - {id(unit) for unit in made}
        going = [unit for unit in owner.units if id(unit) not in kept]
        owner.make_real(made)
        to = {id(param): Place(unit, index) for unit in made for index, param in enumerate(unit.params)}
        to |= {
            id(p): to[id(q)] for unit in made for (_, p), q in zip(unit.plan.params, unit.params, strict=True)
        }
        for follower in self._following():
            follower.leave(going)
        put_already: set[int] = set()
        stayed: set[int] = set()
        leaving: list[nn.Parameter] = []
        for unit in made:
            unit.begin(owner.store)
        for unit in going:
            rewritten = {id(unit.params[index]) for index in unit.rewritten()}
            moving = {
                id(p) for p, s in zip(unit.params, unit.layout.slots, strict=True) if p.shape == s.shape
            }
            moving &= to.keys()
            leaving += self._move_unit(unit, to, moving, rewritten)
            stayed |= moving
            put_already |= moving - rewritten
        for unit in made:
            for index, param in enumerate(unit.params):
                if id(param) not in put_already:
                    value = param.detach().to(unit.device).clone(memory_format=torch.contiguous_format)
                    owner.take_from_first(value, unit.about)
                    put(Place(unit, index), value)
            finish(unit)
        owner.reconnect(units, leaving)
        for module in owner.model.modules():
            for buffer in module._buffers.values() if id(module) not in known else ():
                if buffer is not None:
                    owner.take_from_first(buffer, "a buffer")
        for follower in self._following():
            follower.cut_anew(stayed)

    def _match(self) -> tuple[list[FlatUnit], list[FlatUnit]]:
        """All units of the new structure in order, and those of them that are not there yet."""
        owner = self._owner
        lingering = {
            id(param)
            for unit in owner.units
            for param, has_grad in zip(unit.params, unit.has_grad, strict=True)
            if has_grad and unit.trainable
        }
        home = {id(param): unit for unit in owner.units for param in unit.params}
        taken = {unit.key for unit in owner.units}
        units, made = [], []
        for plan in owner.factory.plan(owner.model, lingering):
            unit = home.get(id(plan.params[0][1]))
            if unit is not None and is_cut_for(unit, plan):
                rename(unit, plan)
            else:
                number = 2
                key = plan.key
                while key in taken:
                    key, number = f"{plan.key}#{number}", number + 1
                taken.add(key)
                before = [home.get(id(param)) for _, param in plan.params]
                whole = any(old is not None and old.cut == "whole" for old in before)
                unit = owner.factory.make(replace(plan, key=key), whole=whole)
                made.append(unit)
            units.append(unit)
        return units, made

    def _move_unit(
        self, unit: FlatUnit, to: Mapping[int, Place], moving: Set[int], rewritten: Set[int]
    ) -> list[nn.Parameter]:
        """Hand on what one unit has, and dissolve it. Returns the parameters that left the model."""
        comm, slots, params = self._owner.gather_comm, unit.layout.slots, unit.params
        leaving = {i: param for i, param in enumerate(params) if id(param) not in to}
        moves = {i: to[id(param)] for i, param in enumerate(params) if id(param) in moving}

        def of(index: int, flat: Tensor) -> Tensor:
            return flat[slots[index].start : slots[index].end]

        values = gather_shards(comm, unit, unit.values().detach())
        for index, new in moves.items():
            if id(params[index]) not in rewritten:
                put(new, of(index, values))
        last = {index: of(index, values).to(unit.dtype, copy=True) for index in leaving}
        if unit.gradient is not None and any(unit.has_grad):
            values = gather_shards(comm, unit, unit.gradient)
            for index, new in moves.items():
                if unit.has_grad[index]:
                    put_grad(new, of(index, values))
                    new.unit.is_mean = unit.is_mean
        for follower in self._following():
            for name, shard in follower.shards_of(unit):
                values = gather_shards(comm, unit, shard)
                for index, new in moves.items():
                    follower.put(name, Place(unit, index), new, of(index, values))
        unit.dissolve()
        for index, param in leaving.items():
            if id(param) not in rewritten:
                param.data = last[index].view(slots[index].shape)
        return list(leaving.values())

    def _take_stray(self) -> None:
        """Gradients that reached parameters before any unit knew them go the way of all others."""
        reducer = self._owner.reducer
        reducer.open_round()
        for index, unit in enumerate(reducer.units):
            for slot, param in enumerate(unit.params):
                if param.grad is not None:
                    reducer.take(index, slot, param.grad)
                    param.grad = None
        reducer.close_round()

    # -- do all ranks see the same? ------------------------------------------------------------------------

    def _compare(self) -> bool:
        """Raises RuntimeError naming a rank and a parameter that differ. Has any rank stray gradients?"""
        seen = self._describe()
        digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        stray = any(param.grad is not None for param in self._owner.model.parameters())
        answers = [
            json.loads(text)
            for text in exchange(self._owner.control, json.dumps([digest, stray]), about=_CHANGED)
        ]
        if len({answer[0] for answer in answers}) > 1:
            self._name_difference(seen)
        return any(answer[1] for answer in answers)

    def _explain(self) -> NoReturn:
        """Another rank changed its model and this one did not: say what. Collective with that rank."""
        self._compare()
        raise RuntimeError(
            "the ranks changed their models alike, but not at the same point between two collectives: change "
            "them on every rank before the same forward"
        )

    def _describe(self) -> list[list[Json]]:
        """Name and what is to be equal of it, for every parameter and every follower."""
        known = {
            id(p): slot.fqn
            for unit in self._owner.units
            for slot, p in zip(unit.layout.slots, unit.params, strict=True)
        }
        new = {id(unit.params[index]) for unit in self._owner.units for index in unit.rewritten()}
        seen: list[list[Json]] = []
        for name, param in self._owner.model.named_parameters(remove_duplicate=False):
            was = known.get(id(param), "a new parameter")
            origin = f"{was} with new data" if id(param) in new else was
            seen.append(
                [name, f"{list(param.shape)} {param.dtype} requires_grad={param.requires_grad} {origin}"]
            )
        for number, follower in enumerate(self._following()):
            seen.append([f"what follows it, {number}", json.dumps(follower.describe())])
        return seen

    def _name_difference(self, seen: list[list[Json]]) -> NoReturn:
        texts = exchange(self._owner.control, json.dumps(seen), about=_CHANGED)
        first, *others = [dict(json.loads(text)) for text in texts]
        for rank, other in enumerate(others, 1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise RuntimeError(
                        f"the ranks changed the model differently: {name} is {first.get(name, 'not there')} "
                        f"on rank 0 and {other.get(name, 'not there')} on rank {rank}; make the same change "
                        "on every rank before the same forward"
                    )
        raise RuntimeError("the ranks have the model's parameters in different orders")


def put(place: Place, value: Tensor) -> None:
    """The whole value of one parameter, in any dtype: this rank's part into shard and master."""
    unit, slot, value = place.unit, place.unit.layout.slots[place.index], value.reshape(-1)
    if unit.keep_whole:
        unit.whole[slot.start : slot.end].copy_(value)
    part = unit.layout.overlap(unit.rank, place.index)
    if part is None:
        return
    (low, high), value = part.local, value[part.begin : part.begin + part.local[1] - part.local[0]]
    if not unit.keep_whole:
        unit.local[low:high].copy_(value)
    if unit.trainable and unit.separate_master:
        with unit.master() as lease:
            lease.tensor[low:high].copy_(value)
            lease.dirty = True


def put_grad(place: Place, value: Tensor) -> None:
    """The whole reduced gradient of one parameter: this rank's part."""
    unit, part = place.unit, place.unit.layout.overlap(place.unit.rank, place.index)
    if unit.gradient is None:
        unit.gradient = torch.zeros(unit.layout.shard_numel, dtype=unit.grad_dtype, device=unit.device)
    unit.has_grad[place.index] = True
    if part is not None:
        low, high = part.local
        unit.gradient[low:high].copy_(value[part.begin : part.begin + high - low])


def finish(unit: FlatUnit) -> None:
    """Every parameter was put: they show the unit's memory now."""
    unit.state = Whole.READY
    if unit.keep_whole:
        unit.point_at_whole()
    unit.note_versions()
    if not unit.keep_whole:
        unit.let_go()


def is_cut_for(unit: FlatUnit, plan: UnitPlan) -> bool:
    """Is this the unit of `plan`, but for names?"""
    same = len(plan.params) == len(unit.params) and all(map(is_, (p for _, p in plan.params), unit.params))
    return same and (plan.dtype, plan.trainable) == (unit.dtype, unit.trainable) and not unit.rewritten()


def rename(unit: FlatUnit, plan: UnitPlan) -> None:
    """The same parameters under other names, or with other users."""
    named = zip(unit.layout.slots, plan.params, strict=True)
    unit.layout = replace(unit.layout, slots=tuple(replace(slot, fqn=fqn) for slot, (fqn, _) in named))
    unit.plan, unit.about = plan, plan.about
    for fqn, param in plan.params:
        rename_absent(param, fqn)
