"""The lists of tensors that a step gets: what fits together, what one index can walk, how bf16 is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ds_kernels.check import names, refuse
from ds_kernels.native import DTYPES

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Lists:
    """One step's tensors: the i-th of every list belongs to the i-th parameter; an empty list is not wanted.

    `saved` are the parameters' keepers, then those of each state list.
    """

    op: str
    names: tuple[str, ...]  # of the state lists
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    copies: list[Tensor]
    steps: list[int]
    saved: list[list[Tensor]] = field(default_factory=list)

    def named(self) -> dict[str, list[Tensor]]:
        """Every list of tensors under its argument's name."""
        found = {
            "params": self.params,
            "grads": self.grads,
            **dict(zip(self.names, self.states, strict=True)),
        }
        if self.copies:
            found["copies"] = self.copies
        for name, part in zip(("params", *self.names), self.saved, strict=bool(self.saved)):
            found[f"saved ({name})"] = part
        return found

    def every(self) -> list[list[Tensor]]:
        return list(self.named().values())

    def written(self) -> list[list[Tensor]]:
        """The lists that the step writes."""
        return [part for name, part in self.named().items() if name != "grads"]

    def chosen(self, places: Sequence[int]) -> Lists:
        """The step of these parameters alone."""

        def some(part: list[Tensor]) -> list[Tensor]:
            return [part[i] for i in places] if part else part

        return replace(
            self,
            params=some(self.params),
            grads=some(self.grads),
            states=[some(part) for part in self.states],
            copies=some(self.copies),
            steps=[self.steps[i] for i in places],
            saved=[some(part) for part in self.saved],
        )

    def walkable(self) -> tuple[Lists, Lists]:
        """The part in which one index walks the memory of all lists alike, and the rest."""
        every = self.every()
        if all(t.is_contiguous() for part in every for t in part):
            return self, self.chosen([])
        flat = [_is_flat(tensors) for tensors in zip(*every, strict=True)]
        return (
            self.chosen([i for i, ok in enumerate(flat) if ok]),
            self.chosen([i for i, ok in enumerate(flat) if not ok]),
        )

    def check(self) -> None:
        """Raise ValueError for anything that the op does not allow, except aliasing (see `check_apart`)."""
        lists, count = self.named(), len(self.params)
        lengths = {name: len(tensors) for name, tensors in lists.items()}
        for name, length in {**lengths, "steps": len(self.steps)}.items():
            if length != count:
                raise ValueError(
                    f"{self.op}: {name} has {length} entries, params has {count}: one for each parameter"
                )
        if not count:
            return
        numels = [p.numel() for p in self.params]
        for name, tensors in lists.items():
            self._check_kind(name, tensors)
            if name == "params":
                continue
            if name in self.names:
                # Two shapes at a time: thousands that live together set off garbage collections.
                fits = [t.shape == p.shape for t, p in zip(tensors, self.params, strict=True)]
                if not all(fits):
                    self._refuse(name, tensors, "its parameter's shape", fits)
            elif [t.numel() for t in tensors] != numels:
                fits = [t.numel() == n for t, n in zip(tensors, numels, strict=True)]
                self._refuse(name, tensors, "as many elements as its parameter", fits)
        if min(self.steps) < 1:
            at = self.steps.index(min(self.steps))
            raise ValueError(
                f"{self.op}: steps[{at}]={self.steps[at]}: they count from 1, this step included"
            )

    def _check_kind(self, name: str, tensors: list[Tensor]) -> None:
        allowed: tuple[torch.dtype, ...] = DTYPES
        if name.startswith("saved"):
            place = [f"saved ({part})" for part in ("params", *self.names)].index(name)
            allowed = ([self.params, *self.states][place][0].dtype,)
        device, first = self.params[0].device, tensors[0]
        dtype, layout = first.dtype if first.dtype in allowed else allowed[0], torch.strided
        fits = [t.dtype is dtype and t.layout is layout and t.device == device for t in tensors]
        if not all(fits):
            wanted = f"strided, on {device}, one dtype of {names(allowed)} for the whole list"
            self._refuse(name, tensors, wanted, fits)

    def _refuse(self, name: str, tensors: Sequence[Tensor], wanted: str, fits: Sequence[bool]) -> None:
        at = fits.index(False)
        refuse(self.op, f"{name}[{at}]", tensors[at], wanted)

    def check_apart(self, addresses: Iterable[Iterable[int]] | None = None) -> None:
        """Raise ValueError if two tensors that the step writes start at one address (0 is an empty tensor's).

        `addresses`: those of `written()`, where they are at hand.
        """
        if addresses is None:
            addresses = [[t.data_ptr() for t in part] for part in self.written()]
        found = [address for part in addresses for address in part if address]
        if len(set(found)) != len(found):
            parts = ", ".join(name for name in self.named() if name != "grads")
            raise ValueError(
                f"{self.op}: two tensors of {parts} start at the same address; give each its own memory"
            )


def _is_flat(tensors: Sequence[Tensor]) -> bool:
    """Can one index walk the memory of all: contiguous, or of one dense layout (channels_last)?"""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    alike = all(t.shape == first.shape and t.stride() == first.stride() for t in tensors)
    return alike and bool(torch.ops.aten.is_non_overlapping_and_dense(first))


# -- rounding ----------------------------------------------------------------------------------------------


def seeds(op: str, seed: int | None, states: int) -> tuple[int, ...]:
    """32 bits for the parameters and for each state list. Raises ValueError for a negative seed."""
    if seed is None:
        return (0,) * (1 + states)
    if seed < 0:
        raise ValueError(f"{op}: seed={seed} is not allowed: it must be >= 0, or None to round to nearest")
    return tuple(_mixed(4 * seed + k) for k in range(1 + states))


def _mixed(value: int) -> int:
    """The finalizer of splitmix64, folded: neighbours become strangers."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (value ^ value >> 31) & _MASK


def narrow_(kept: list[Tensor], values: list[Tensor], seed: int | None) -> None:
    """Round fp32 values into what keeps them: to nearest even, or bf16 with `seed` up or down by chance.

    The chance is drawn from the value itself and the seed (lowbias32, Wellons 2018), not from its place: so
    it is the same however tensors are cut, and mean over many seeds is the value.
    """
    if kept is values:
        return
    if seed is None or kept[0].dtype != torch.bfloat16:
        torch._foreach_copy_(kept, values)
        return
    for low, value in zip(kept, values, strict=True):
        bits = value.contiguous().view(torch.int32).to(torch.int64) & _MASK
        h = bits ^ seed
        h = ((h ^ h >> 16) * 0x7FEB352D) & _MASK
        h = ((h ^ h >> 15) * 0x846CA68B) & _MASK
        drawn = (bits + ((h ^ h >> 16) & 0xFFFF)) & 0xFFFF0000
        exact = torch.where(value.isnan(), bits, drawn)
        signed = torch.where(exact >= 2**31, exact - 2**32, exact).to(torch.int32)
        low.copy_(signed.view(torch.float32))  # a float that bf16 holds: this rounds nothing
