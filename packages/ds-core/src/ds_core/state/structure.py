"""A cheap look at a model: are its parameters still the ones that its units were cut for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from ds_core.state.unit import FlatUnit


@dataclass(frozen=True, slots=True)
class Look:
    """`changed`: units must be cut anew before anything runs. `frozen`: parameters that merely stopped
    training, which can stay where they are.
    """

    changed: bool
    frozen: tuple[nn.Parameter, ...] = ()


class Structure:
    """Remembers the modules, their parameters and who trains. A look walks flat lists: some 3 us a module
    in a step, where nothing is in cache, and a fifth of it where all is (benchmarks/structure.py of ds-zero).

    Noticed: a module, parameter or name that was added, removed, moved or replaced; a parameter that was
    frozen and trains now, or the other way; a parameter whose `.data` is other memory (resized, cast, moved).
    """

    def __init__(self, model: nn.Module, units: Sequence[FlatUnit]) -> None:
        self.modules = list(model.modules())
        self._units = units
        self._sizes, self._names, self._held = self._walk()
        self._params = [param for unit in units for param in unit.params]
        self._trains = [unit.trainable for unit in units for _ in unit.params]

    def look(self) -> Look:
        """What is different now. Local to this rank."""
        sizes, names, held = self._walk()
        if sizes != self._sizes or names != self._names or not all(map(is_, held, self._held)):
            return Look(True)
        with torch._C.DisableTorchFunctionSubclass():
            trains = [param.requires_grad for param in self._params]
        frozen: tuple[nn.Parameter, ...] = ()
        if trains != self._trains:
            pairs = list(zip(self._params, trains, self._trains, strict=True))
            if any(now and not before for _, now, before in pairs):
                return Look(True)
            frozen = tuple(param for param, now, before in pairs if before and not now)
        return Look(any(unit.rewritten() for unit in self._units), frozen)

    def _walk(self) -> tuple[list[int], list[str], list[Any]]:
        """Every module's parameters and children: how many, their names, and themselves."""
        dicts: list[dict[str, Any]] = [module._parameters for module in self.modules]
        dicts += [module._modules for module in self.modules]
        held = chain.from_iterable(each.values() for each in dicts)
        return list(map(len, dicts)), list(chain.from_iterable(dicts)), list(held)
