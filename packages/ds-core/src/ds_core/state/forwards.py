"""Other `forward`s on a user's modules, inside of every hook, and a handle that takes them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ds_core.state.units import blocks_of

# Which blocks: all (None), every k-th, those that a pattern finds something in the name of, or a function.
Choice = None | int | str | Callable[[str, nn.Module], bool]

# module -> the features (of ds_core.limits) that run in place of its own forward
_SWAPPED: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


class ForwardSwap:
    """Modules that run something else in place of their own `forward`; `remove()` undoes it, last one first.

    Hooks stay outside: at stage 3 they bring and let go the parameters around whatever runs. `feature` is
    what `ds_core.limits` calls it.
    """

    def __init__(self, feature: str) -> None:
        self._feature = feature
        self._before: list[tuple[nn.Module, Any]] = []

    def put(self, modules: Iterable[nn.Module], wrap: Callable[[Callable[..., Any]], Any]) -> ForwardSwap:
        """`module.forward = wrap(module.forward)` for each of them, once for each."""
        for module in dict.fromkeys(modules):
            self._before.append((module, module.__dict__.get("forward")))
            module.forward = wrap(module.forward)
            _SWAPPED.setdefault(module, []).append(self._feature)
        return self

    def remove(self) -> None:
        """Every module has the `forward` that it had. A second call does nothing."""
        while self._before:
            module, own = self._before.pop()
            del module.forward
            if own is not None:
                module.forward = own
            _SWAPPED[module].remove(self._feature)


def swapped_in(model: nn.Module) -> set[str]:
    """The features that any module of the model runs in place of its own forward."""
    return {feature for module in model.modules() for feature in _SWAPPED.get(module, ())}


def choose_blocks(model: nn.Module, which: Choice = None) -> Mapping[str, nn.Module]:
    """Blocks of a model by full name, in definition order.

    None, a number k (the first and every k-th after it) and a function of (name, module) choose among the
    children of repeating containers; a regular expression among all modules, by what it finds in the name.
    Raises ValueError when nothing is chosen.
    """
    blocks = blocks_of(model)
    if isinstance(which, str):
        chosen = {name: module for name, module in model.named_modules() if re.search(which, name)}
    elif isinstance(which, int):
        if which < 1:
            raise ValueError(f"every k-th block needs k of at least 1, got {which}")
        chosen = dict(list(blocks.items())[::which])
    else:
        chosen = {name: m for name, m in blocks.items() if which is None or which(name, m)}
    if not chosen:
        names = ", ".join(list(blocks)[:5]) or "none: the model repeats nothing"
        raise ValueError(f"{which!r} chooses no module; the model's blocks are {names}")
    return chosen
