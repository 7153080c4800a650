"""Which parameters travel together: a model's blocks and leaves as flat units (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Parameters of one dtype and one trainability that are gathered, reduced and updated together.

    `dtype`: theirs in the unit; they may come in another. `users`: the modules (full names) whose forward
    needs them. A parameter tied into another block is in one unit with several users.
    """

    key: str
    params: tuple[tuple[str, nn.Parameter], ...]
    users: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool

    @property
    def about(self) -> str:
        """What this is in a message: its first parameter and the module that needs it."""
        return f"{self.key} (module {self.users[0] or 'the model'})" if self.users else self.key

    @property
    def numel(self) -> int:
        return sum(param.numel() for _, param in self.params)


LEAF_MARK = "_ds_leaf"  # on a module that is never split


@dataclass(frozen=True, slots=True)
class Split:
    """How finely a model is cut into units; see `plan_units`."""

    bucket_numel: int
    leaves: tuple[str, ...] = ()


@dataclass(slots=True)
class _Atom:
    """A module that is never split, with the parameters that it is the first to hold."""

    name: str
    module: nn.Module
    deep: bool  # covers its whole subtree but for what is apart, or its direct parameters only
    apart: bool = False  # never put together with a neighbour
    user: str | None = None  # whose forward needs it, where that is not this module's own
    owned: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)


Kind = tuple[torch.dtype, bool]  # of a parameter in its unit: dtype, trainable


def _as_it_is(fqn: str, param: nn.Parameter) -> Kind:
    return param.dtype, param.requires_grad


def plan_units(
    model: nn.Module,
    *,
    bucket_numel: int = 1_000_000,
    kind_of: Callable[[str, nn.Parameter], Kind] = _as_it_is,
    leaves: Sequence[str] = (),
) -> tuple[UnitPlan, ...]:
    """Cut a model into units, in definition order.

    The children of the outermost repeating container (ModuleList, Sequential or ModuleDict with two or more
    children of one class) are blocks and stay whole: whatever happens inside one, however dynamic, is the
    business of its single unit. A module with parameters of its own stays whole too, unless a repeating
    container is below it. Everything else is cut down to its leaves. Neighbours smaller than `bucket_numel`
    elements are put together until they reach it. A module whose class says `own_unit = True` (a tile of a
    layer that is larger than memory) is a unit by itself, wherever it is.

    Modules whose full name matches a pattern of `leaves`, or that bear the LEAF_MARK, are never split, and no
    container is whose name has "expert" in it: ranks that route to different children still need the same
    units.
    """
    if bucket_numel < 1:
        raise ValueError(f"bucket_numel must be at least 1 element, got {bucket_numel}")
    atoms = list(_atoms("", model, "", leaves))
    _assign(atoms)
    made: list[tuple[Kind, list[tuple[str, nn.Parameter]], list[str]]] = []
    room: dict[Kind, int] = {}  # the unit of each kind that may still take a neighbour
    for atom in atoms:
        split: dict[Kind, list[tuple[str, nn.Parameter]]] = {}
        for name, param in atom.owned:
            split.setdefault(kind_of(name, param), []).append((name, param))
        for kind, params in split.items():
            users = [
                other.name if other.user is None else other.user
                for other in atoms
                if other is atom or other.shared & {id(p) for _, p in params}
            ]
            _, there, of = made[room[kind]] if kind in room else (kind, [], [])
            if not there or atom.apart or sum(p.numel() for _, p in there) >= bucket_numel:
                made.append((kind, params, users))
                if not atom.apart:
                    room[kind] = len(made) - 1
            else:
                there.extend(params)
                of.extend(user for user in users if user not in of)
    return tuple(UnitPlan(params[0][0], tuple(params), tuple(users), *kind) for kind, params, users in made)


def _atoms(name: str, module: nn.Module, caller: str, leaves: Sequence[str]) -> Iterator[_Atom]:
    """`caller`: the nearest module around this one that has a forward."""
    if not any(True for _ in module.parameters()):
        return
    called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    named = any(fnmatch(name, pattern) for pattern in leaves) or getattr(module, LEAF_MARK, False)
    if named or (_is_repeating(module) and _is_routed(name)):
        yield _Atom(name, module, deep=True, user=name if called else caller)
        return
    children = [(f"{name}.{child}" if name else child, sub) for child, sub in module.named_children()]
    direct = any(param is not None for param in module._parameters.values())
    if _is_repeating(module):
        if direct:
            yield _Atom(name, module, deep=False)
        for child_name, child in children:
            if any(True for _ in child.parameters()):
                yield from _whole(child_name, child)
        return
    if not children or (direct and not any(_is_repeating(sub) for sub in module.modules())):
        yield from _whole(name, module)
        return
    if direct:
        yield _Atom(name, module, deep=False)
    for child_name, child in children:
        yield from _atoms(child_name, child, name if called else caller, leaves)


def _is_routed(name: str) -> bool:
    return "expert" in name.rpartition(".")[2].lower()


def _whole(name: str, module: nn.Module) -> Iterator[_Atom]:
    """A module with all that is below it, and after it what is apart."""
    yield _Atom(name, module, deep=True, apart=_is_apart(module))
    for below, sub in module.named_modules(prefix=name):
        if sub is not module and _is_apart(sub):
            yield _Atom(below, sub, deep=True, apart=True)


def _is_apart(module: nn.Module) -> bool:
    return bool(getattr(type(module), "own_unit", False))


def _named_parameters(atom: _Atom) -> Iterator[tuple[str, nn.Parameter]]:
    """The atom's parameters by full name, without those of what is apart below it."""
    below = atom.module.named_modules(prefix=atom.name) if atom.deep else [(atom.name, atom.module)]
    for name, module in below:
        if module is atom.module or not _is_apart(module):
            for key, param in module._parameters.items():
                if param is not None:
                    yield (f"{name}.{key}" if name else key), param


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """What no unit splits, by full name: the children of the outermost repeating containers."""
    found: dict[str, nn.Module] = {}
    queue = [("", model)]
    while queue:
        name, module = queue.pop(0)
        children = [(f"{name}.{child}" if name else child, sub) for child, sub in module.named_children()]
        children = [(child, sub) for child, sub in children if any(True for _ in sub.parameters())]
        if _is_repeating(module):
            found.update(children)
        else:
            queue.extend(children)
    return found


def _is_repeating(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    kinds = [type(child) for child in module.children() if any(True for _ in child.parameters())]
    return len(kinds) > len(set(kinds))


def _assign(atoms: Sequence[_Atom]) -> None:
    """Each parameter to the first atom that holds it; the others share it."""
    taken: set[int] = set()
    for atom in atoms:
        for name, param in _named_parameters(atom):
            if id(param) not in taken:
                taken.add(id(param))
                atom.owned.append((name, param))
            elif not any(param is own for _, own in atom.owned):
                atom.shared.add(id(param))
