"""The choice of columns, and what it is worth: gradient energies summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_offload.zen_later import unmeasured
from ds_offload.zen_select import add_energies, choose, columns_of
from ds_offload.zen_view import View, gradient_of


class Unmeasured:
    """In place of `Energy` where both intervals are numbers: no pass over gradients, no wait for a device."""

    inside = whole = staticmethod(unmeasured)


class Energy:
    """Of one step's gradients: of selected elements, and of all, by parameter."""

    def __init__(self) -> None:
        self._inside: dict[str, float] = {}
        self._whole: dict[str, float] = {}

    def inside(self, fqn: str, gradient: Tensor) -> None:
        self._inside[fqn] = self._inside.get(fqn, 0.0) + _energy(gradient)

    def whole(self, fqn: str, gradient: Tensor) -> None:
        self._whole[fqn] = self._whole.get(fqn, 0.0) + _energy(gradient)

    def table(self, names: Sequence[str]) -> Tensor:
        """[names, 2] fp64: inside, and whole."""
        inside, whole = self._inside, self._whole
        rows = [[inside.get(name, 0.0), whole.get(name, inside.get(name, 0.0))] for name in names]
        return torch.tensor(rows, dtype=torch.float64)


class Choice:
    """All ranks choose the same, from one message."""

    def __init__(self, view: View, ratio: float) -> None:
        self._view, self._ratio = view, ratio

    def select(self, numbers: dict[str, dict[str, Any]]) -> None:
        """Choose columns by this step's gradients; used from the next step on. Collective.

        `numbers` of later updates begin, where there are none yet, as those of all updates so far. A
        parameter without a gradient keeps what was chosen before.
        """
        view, flow = self._view, self._view.progress
        slots = view.slots()
        sizes = {fqn: columns_of(unit.layout.slots[index].shape) for fqn, (unit, index) in slots.items()}
        energies = {fqn: torch.zeros(size, dtype=torch.float64) for fqn, size in sizes.items()}
        stride = view.store.policy.chunk_numel
        for piece in view.pieces():
            gradient = gradient_of(piece)
            if piece.fqn in energies and gradient is not None:
                for at in range(0, gradient.numel(), stride):
                    begin = piece.overlap.begin + at
                    add_energies(energies[piece.fqn], gradient[at : at + stride], begin)
        if energies:
            summed = view.total(torch.cat(list(energies.values())), "the columns' gradient energy")
            for fqn, found in zip(sizes, torch.split(summed, list(sizes.values())), strict=True):
                chosen = choose(found, self._ratio)
                if chosen is not None:
                    unit, index = slots[fqn]
                    flow.selection[fqn] = chosen
                    flow.shapes[fqn] = tuple(unit.layout.slots[index].shape)
        flow.since, flow.judge.worth = 0, None
        for piece in view.pieces():
            if piece.fqn in flow.selection and piece.fqn not in numbers:
                numbers[piece.fqn] = view.numbers(piece)
            if (home := view.store.home_of(f"{piece.unit.key}/grad")) is not None:
                home.forget()

    def judge(self, energies: Energy | Unmeasured) -> None:
        """Take in what was measured in this step. Collective, if it was."""
        flow = self._view.progress
        names = list(flow.selection)
        if isinstance(energies, Unmeasured) or not names:
            return
        sums = self._view.total(energies.table(names), "gradient energy in and outside")
        for name, (within, total) in zip(names, sums.tolist(), strict=True):
            rows, columns = flow.shapes[name][0], columns_of(flow.shapes[name])
            chosen = len(flow.selection[name])
            if chosen < columns:
                rest = max(0.0, total - within)
                flow.judge.of(name).add(within, rest, rows * chosen, rows * (columns - chosen))


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
