"""Which columns are updated at once: their gradient energy, the choice, and the parts of a cut parameter.

Both automatic intervals compare energies (sums of squared gradients) inside and outside of the selection,
which all ranks add up in one message a step.

update_interval="auto", after Zen-auto and its implementation: a parameter is due when the gradients added up
outside of its selection could weigh as much as one step's inside: the sum over the interval's steps of the
root mean square outside has reached the interval's mean of the root mean square inside. The interval ends
when `auto_ratio` of the parameters are due, and after AUTO_LONGEST steps.

select_interval="auto": a selection is renewed at the end of an interval in which what it held of the energy,
beyond the share that columns taken at random hold, has fallen to half of what it was in its first interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

WORTH = 0.5  # of a selection's first interval: below it the selection is renewed


def columns_of(shape: torch.Size | tuple[int, ...]) -> int:
    """Of a parameter seen as [rows, columns]; 0 where it has none to choose between."""
    if len(shape) < 2:
        return 0
    return int(torch.Size(shape[1:]).numel())


class Part:
    """The chosen elements of a flat range [begin, begin + numel) of a row-major [rows, columns] parameter.

    `chosen`: column numbers, ascending; None for every element. A range may begin and end within a row:
    whole rows are looked at as a matrix, the rest element by element.
    """

    def __init__(self, begin: int, numel: int, columns: int, chosen: Tensor | None) -> None:
        self.numel = numel
        self._whole = chosen is None
        if chosen is None:
            self.count = numel
            return
        first = begin % columns
        head = min(numel, (columns - first) % columns)
        rows = (numel - head) // columns
        self._rows, self._columns = slice(head, head + rows * columns), columns
        tail = self._rows.stop
        before = chosen[(chosen >= first) & (chosen < first + head)] - first
        after = chosen[chosen < numel - tail] + tail
        edges = torch.cat([before, after])
        self._edges = len(edges)
        self._places = {chosen.device: (chosen, edges)}
        self.count = rows * len(chosen) + len(edges)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Column numbers and places of single elements, on the device or the host, where they are used."""
        if device not in self._places:
            chosen, edges = next(iter(self._places.values()))
            self._places[device] = chosen.to(device), edges.to(device)
        return self._places[device]

    def take(self, flat: Tensor) -> Tensor:
        """[numel] -> [count], a copy where `flat` is."""
        if self._whole:
            return flat.clone()
        chosen, edges = self._on(flat.device)
        inner = flat[self._rows].view(-1, self._columns).index_select(1, chosen)
        return torch.cat([inner.reshape(-1), flat[edges]])

    def put(self, flat: Tensor, values: Tensor) -> None:
        """[count] into their places of [numel], converted as they are written."""
        values = values.to(device=flat.device, dtype=flat.dtype)
        if self._whole:
            flat.copy_(values)
            return
        inner = self.count - self._edges
        chosen, edges = self._on(flat.device)
        flat[self._rows].view(-1, self._columns).index_copy_(1, chosen, values[:inner].view(-1, len(chosen)))
        flat.index_copy_(0, edges, values[inner:])


def add_energies(into: Tensor, flat: Tensor, begin: int) -> None:
    """Squares of a range that begins at element `begin` of its parameter: [numel] -> += [columns] fp64."""
    columns, numel = into.numel(), flat.numel()
    squares = flat.double().square_()
    first = begin % columns
    head = min(numel, (columns - first) % columns)
    rows = (numel - head) // columns
    tail = head + rows * columns
    into[first : first + head] += squares[:head].to(into.device)
    into += squares[head:tail].view(rows, columns).sum(0).to(into.device)
    into[: numel - tail] += squares[tail:].to(into.device)


def choose(energies: Tensor, ratio: float) -> Tensor | None:
    """[columns] -> numbers of the `ratio` with most energy (at least one), ascending; of equals the first.

    None where there is no energy to choose by.
    """
    if not bool(energies.any()):
        return None
    count = max(1, round(ratio * energies.numel()))
    best = torch.argsort(energies, descending=True, stable=True)[:count]
    return best.sort().values.cpu()


def pack(chosen: Tensor, columns: int) -> str:
    """Column numbers as text: one bit each, hexadecimal."""
    mask = torch.zeros(-(-columns // 8) * 8, dtype=torch.uint8)
    mask[chosen] = 1
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return bytes((mask.view(-1, 8) * weights).sum(1).tolist()).hex()


def unpack(text: str) -> Tensor:
    """What `pack` packed."""
    found = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
    bits = found[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.view(-1).nonzero().view(-1)


@dataclass(slots=True)
class Energies:
    """Of one parameter: energy inside and outside of its selection, as added up since the interval began."""

    inside: float = 0.0
    outside: float = 0.0
    inside_rms: float = 0.0  # sums over steps
    outside_rms: float = 0.0
    steps: int = 0

    def add(self, inside: float, outside: float, chosen: int, rest: int) -> None:
        """One step's, of `chosen` and `rest` elements."""
        self.inside += inside
        self.outside += outside
        self.inside_rms += (inside / max(1, chosen)) ** 0.5
        self.outside_rms += (outside / max(1, rest)) ** 0.5
        self.steps += 1

    @property
    def due(self) -> bool:
        """Has as much been added up outside as one step does inside?"""
        return self.steps > 0 and self.outside_rms >= self.inside_rms / self.steps


@dataclass(slots=True)
class Judge:
    """Decides both automatic intervals from energies that are the same on every rank."""

    auto_ratio: float
    topk_ratio: float
    energies: dict[str, Energies] = field(default_factory=dict)  # by parameter
    worth: float | None = None  # of the selection in its first interval

    def of(self, name: str) -> Energies:
        """What is added up of one parameter."""
        return self.energies.setdefault(name, Energies())

    def ends(self) -> bool:
        """Are enough parameters due?"""
        due = sum(each.due for each in self.energies.values())
        return bool(self.energies) and due >= self.auto_ratio * len(self.energies)

    def close(self) -> bool:
        """The interval is over. True when the selection has lost its worth."""
        inside = sum(each.inside for each in self.energies.values())
        total = inside + sum(each.outside for each in self.energies.values())
        self.energies = {}
        if not total:
            return False
        worth = inside / total - self.topk_ratio
        if self.worth is None:
            self.worth = worth
            return False
        return worth < WORTH * self.worth

    def save(self) -> dict[str, object]:
        table = {
            name: [e.inside, e.outside, e.inside_rms, e.outside_rms, e.steps]
            for name, e in self.energies.items()
        }
        return {"energies": table, "worth": self.worth}

    def load(self, saved: Mapping[str, object]) -> None:
        table = saved["energies"]
        assert isinstance(table, Mapping)
        self.energies = {name: Energies(*numbers) for name, numbers in table.items()}
        worth = saved["worth"]
        assert worth is None or isinstance(worth, float)
        self.worth = worth
