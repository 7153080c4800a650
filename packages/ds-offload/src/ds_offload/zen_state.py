"""What ZenFlow knows between steps, and how it lies in the optimizer's groups and states for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_core.state.shard import Json
from ds_core.train.holdings import Piece
from ds_offload.zen_rule import SAVED, Rule, loaded_rule
from ds_offload.zen_select import Judge, columns_of, pack, unpack

SUMS = ("zenflow_0", "zenflow_1")  # states: gradients that are added up, and those that are being applied
_LATER = "zenflow_later_"  # before the name of a number that the update of the rest keeps


@dataclass(slots=True)
class Progress:
    """Equal on every rank, and complete: it names parameters of which a rank holds nothing.

    `counts`: how many gradients of each parameter are summed in SUMS[turn]; `flying`: of the sums in the
    other one, which are applied with `rule`.
    """

    judge: Judge
    step: int = 0
    filled: int = 0  # steps of this interval
    since: int = 0  # steps since the selection
    turn: int = 0
    selection: dict[str, Tensor] = field(default_factory=dict)  # column numbers by parameter
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    flying: dict[str, int] = field(default_factory=dict)
    rule: Rule | None = None

    def save(self) -> dict[str, Json]:
        columns = {name: pack(c, columns_of(self.shapes[name])) for name, c in self.selection.items()}
        return {
            "step": self.step,
            "filled": self.filled,
            "since": self.since,
            "turn": self.turn,
            "columns": columns,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "counts": dict(self.counts),
            "flying": dict(self.flying),
            "options": None if self.rule is None else self.rule.save(),
            "judge": self.judge.save(),
        }

    def load(self, saved: Mapping[str, Any], optimizer: Any) -> None:
        self.step, self.filled, self.since = saved["step"], saved["filled"], saved["since"]
        self.turn = saved["turn"]
        self.selection = {name: unpack(text) for name, text in saved["columns"].items()}
        self.shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
        self.counts, self.flying = dict(saved["counts"]), dict(saved["flying"])
        self.rule = None if saved["options"] is None else loaded_rule(optimizer, saved["options"])
        self.judge.load(saved["judge"])

    def keep(self, names: Set[str]) -> None:
        """Only these parameters train: what was added up of others is let go."""
        self.counts = {name: count for name, count in self.counts.items() if name in names}
        self.flying = {name: count for name, count in self.flying.items() if name in names}


def put_in_groups(optimizer: Any, saved: dict[str, Json]) -> None:
    """The first group carries it, as schedulers keep `initial_lr` there: checkpoints hold groups' options."""
    optimizer.param_groups[0][SAVED] = saved


def take_from_groups(optimizer: Any) -> dict[str, Any] | None:
    """What is there, which then is not there any more."""
    found = [group.pop(SAVED, None) for group in optimizer.param_groups]
    saved: dict[str, Any] | None = found[0]
    return saved


def put_in_states(
    optimizer: Any, piece: Piece, sums: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """A piece's sums, of its shape, and the numbers of its later updates beside its own states."""
    state = optimizer.state[piece.param]
    for name, value in sums.items():
        state[name] = value
    for name, value in numbers.items():
        state[_LATER + name] = value if isinstance(value, Tensor) else torch.tensor(float(value))


def take_from_states(optimizer: Any, pieces: Iterable[Piece]) -> dict[str, dict[str, Any]]:
    """The other way: numbers by parameter, in the types that the optimizer's own have. Sums are let go."""
    found: dict[str, dict[str, Any]] = {}
    for piece in pieces:
        state = optimizer.state.get(piece.param)
        if not state:
            continue
        for name in SUMS:
            state.pop(name, None)
        for name in [name for name in state if name.startswith(_LATER)]:
            own = name.removeprefix(_LATER)
            like, value = state.get(own), state.pop(name)
            if isinstance(like, Tensor):
                value = value.to(dtype=like.dtype, device=like.device)
            elif like is not None:
                value = type(like)(value.item())
            found.setdefault(piece.fqn, {})[own] = value
    return found
