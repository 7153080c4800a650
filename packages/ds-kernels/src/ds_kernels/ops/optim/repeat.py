"""A native step of what was stepped before: checked by comparing numbers, and past the dispatcher."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ds_kernels.library import open_library
from ds_kernels.native import Native, Options, written
from ds_kernels.ops.optim.elementwise import Part, Parts, Stepper
from ds_kernels.ops.optim.rules import Elementwise, Hyper
from ds_kernels.registry import NAMESPACE, registry

_PLAIN = {Tensor, torch.nn.Parameter}
_DTYPE, _ON_CPU = attrgetter("dtype"), attrgetter("is_cpu")


class Gathered(NamedTuple):
    """The tensors of one step of a rule as they are now; of `copies` there may be none."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    copies: list[Tensor]

    def written(self) -> list[Tensor]:
        """What the step writes."""
        return [*self.params, *(t for part in self.states for t in part), *self.copies]

    def seen(self) -> list[Seen] | None:
        """Parameters, gradients, states and copies as numbers; None unless all can be."""
        found = []
        for part in (self.params, self.grads, *self.states, *([self.copies] if self.copies else [])):
            one = Seen.of(part)
            if one is None:
                return None
            found.append(one)
        return found


class Seen(NamedTuple):
    """All that a native step uses of a list of tensors."""

    addresses: list[int]
    numels: list[int]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Seen | None:
        """None unless all are plain tensors, contiguous and of one dtype.

        One property of all tensors at a time, read by functions that are C throughout: this is most of what a
        repeated step costs. Raises: RuntimeError for tensors that have no address, such as sparse ones.
        """
        dtypes = set(map(_DTYPE, tensors))
        fits = (
            len(dtypes) == 1
            and _PLAIN.issuperset(map(type, tensors))
            and all(map(Tensor.is_contiguous, tensors))
        )
        if not fits:
            return None
        return cls(list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors)), dtypes.pop())

    def part(self) -> Part:
        """As the library gets it."""
        return Part(array("q", self.addresses), self.dtype)


class Ready(NamedTuple):
    """A step that has only to be run."""

    hyper: Hyper
    gathered: Gathered
    seen: list[Seen]

    def run(self, steps: list[int], grad_coef: Tensor | None, seed: int | None) -> None:
        """Make the step, which `steps` counts. Raises ValueError for a negative seed."""
        params, grads, *rest = self.seen
        states, copies = rest[: len(self.gathered.states)], rest[len(self.gathered.states) :]
        parts = Parts(
            array("q", params.numels),
            params.part(),
            grads.part(),
            [state.part() for state in states],
            copies[0].part() if copies else None,
        )
        _stepper().run(parts, self.hyper, steps, grad_coef, seed)
        written(self.gathered.written())


# [Note: a repeated step]
# Of a step over 2000 tensors, checks and the dispatcher's conversions of lists there and back took as long as
# a quarter of its memory traffic. What is checked follows from addresses, lengths, dtypes and contiguity, so
# a step that went well leaves these numbers here, and no tensors, which could then not be freed. The next
# step reads them anew from the tensors that groups and states hold *then*, every one of every tensor, and
# compares: whatever was exchanged, resized, cast or moved in between differs in one of them, and the step
# goes through the op and its checks again.
class Repeat:
    """A rule's step of the same parameters, states and copies as the last one; gradients may be others."""

    def __init__(self, seen: list[Seen]) -> None:
        self._params, self._grads, *self._rest = seen

    @classmethod
    def of(cls, hyper: Hyper, gathered: Gathered) -> Repeat | None:
        """What a step that has just been made leaves for the next; None where it was not wholly native."""
        on_cpu = gathered.params[0].is_cpu
        if not (on_cpu and isinstance(hyper, Elementwise) and _is_native(hyper.op)):
            return None
        try:
            seen = gathered.seen()
            plain = [_plain_bits(part) for part in (gathered.written(), gathered.grads)]
        except RuntimeError:
            return None
        return None if seen is None or not all(plain) else cls(seen)

    def ready(self, hyper: Hyper, gathered: Gathered) -> Ready | None:
        """The call, if every number is what it was; nothing has been written yet.

        Raises: RuntimeError for tensors that have no address.
        """
        seen = gathered.seen()
        if seen is None:
            return None
        params, grads, *rest = seen
        same = (
            params == self._params
            and rest == self._rest
            and grads.numels == params.numels
            and grads.dtype is self._grads.dtype
            and _plain_bits(gathered.grads)
        )
        return Ready(hyper, gathered, seen) if same else None


def _plain_bits(tensors: Sequence[Tensor]) -> bool:
    """Do addresses lead to the values themselves: on the CPU, and not negated when they are read?"""
    return all(map(_ON_CPU, tensors)) and not any(map(Tensor.is_neg, tensors))


def intercepted() -> bool:
    """Does something watch or replace what goes through the dispatcher, so that nothing may go past it?"""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _is_native(op: str) -> bool:
    rows = registry().chosen.get(("optim", "cpu"), ())
    return any(row.op == f"{NAMESPACE}::{op}" and row.implementation == "native" for row in rows)


@cache
def _stepper() -> Stepper:
    return Stepper.of(Native(open_library("optim").handle, Options.from_environment()))
