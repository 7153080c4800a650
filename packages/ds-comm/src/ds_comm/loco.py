"""What rounding loses of a gradient is added to the next one: error feedback, and LoCo's average of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_comm.error_feedback import ErrorRows
from ds_comm.two_hop import OneHop, TwoHop
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit


class ErrorFeedback:
    """A GradientRoute: each rank sends Q(g + e) and keeps e <- beta * e + (1 - beta) * (g + e - Q(g + e)).

    [Note: nothing is lost for good] The rule is e' = e + (1 - beta) * (g - Q), so over T steps the sums of Q
    and of g differ by (e_0 - e_T) / (1 - beta): the mean of what was sent is off by at most 2 / ((1 - beta) *
    T) times the largest e, which never exceeds the codec's error bound. Without feedback it stays off as far
    as rounding to nearest leaves it. With `beta` 0 it is the plain rule (Seide et al., 2014; Karimireddy et
    al., 2019).

    `through` is a codec (one all-to-all over all ranks), or a `TwoHop`: what coding loses of a node's sums,
    and at stage 0 of the means that travel back, is owed by the rank that coded them, in the same [numel].
    `reset_steps`: after so many steps of a unit, however many micro batches they had, its error is dropped.
    Memory: 4 bytes an element of the whole unit on every rank, and as many of the unit under way. Checkpoints
    hold the errors: see ErrorRows.
    """

    whole_grads = False

    def __init__(self, through: Codec | TwoHop, *, beta: float = 0.0, reset_steps: int | None = None) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta!r}; allowed: from 0 to below 1")
        if reset_steps is not None and reset_steps < 1:
            raise ValueError(f"reset_steps={reset_steps!r}; allowed: None (never) or at least 1")
        self.through = through if isinstance(through, TwoHop) else OneHop(through)
        self.beta, self.reset_steps = beta, reset_steps
        self.errors = ErrorRows()
        self._steps: dict[str, int] = {}  # by unit: how many have begun
        self._editions: dict[str, int] = {}  # of the weights that the present step's gradients are of
        self._flying: dict[str, Ticket] = {}
        self._units: list[FlatUnit] = []

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on."""
        return {"through": self.through.settings(), "beta": self.beta, "reset_steps": self.reset_steps}

    def connect(self, owner: FlatOwner) -> None:
        """Collective. Raises ValueError where ranks disagree, or the axis does not divide into nodes."""
        self._settle()
        self.through.connect(owner, self.settings())
        steps = self._steps_by_name()
        self._units = list(owner.trainable)
        self._steps, self._editions = {}, {}
        self._take_steps(steps)
        self.errors.connect(owner.trainable, owner.everyone, owner.changes)

    def explain(self) -> str:
        """What gradients really do, in one line."""
        reset = "never dropped" if self.reset_steps is None else f"dropped every {self.reset_steps} steps"
        return f"{self.through.explain()}; errors fed back with beta {self.beta:g}, {reset}"

    def reduce(self, unit: FlatUnit, out: Tensor, full: Tensor, *, scale: float, accumulate: bool) -> Ticket:
        earlier = self._flying.pop(unit.key, None)
        if earlier is not None:  # of the micro batch before: its error is part of what is sent now
            earlier.wait()
        error = self.errors.of(unit)
        if self._begins_step(unit):
            error.zero_()
        given = torch.zeros(self.through.room(full.numel()), dtype=torch.float32, device=full.device)
        torch.add(error, full, out=given[: full.numel()])

        def keep(lost: Tensor) -> None:
            loss = lost[: error.numel()].nan_to_num_(0.0, 0.0, 0.0)  # where marks stand nothing was sent
            if self.beta:
                error.mul_(self.beta).add_(loss, alpha=1 - self.beta)
            else:
                error.copy_(loss)
            self.errors.clean(unit)

        ticket = self.through.send(unit, out, given, full, scale=scale, accumulate=accumulate, lost=keep)
        self._flying[unit.key] = ticket
        return ticket

    def _begins_step(self, unit: FlatUnit) -> bool:
        """Count the unit's steps: weights changed since its last gradient. True where its error is to go."""
        if self._editions.get(unit.key) == unit.edition:
            return False
        self._editions[unit.key] = unit.edition
        before = self._steps.get(unit.key, 0)
        self._steps[unit.key] = before + 1
        return self.reset_steps is not None and before > 0 and before % self.reset_steps == 0

    def _settle(self) -> None:
        flying, self._flying = self._flying, {}
        for ticket in flying.values():
            ticket.wait()

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """Errors as rows; how many steps each parameter's unit has begun."""
        self._settle()
        state: dict[str, Tensor | FlatShard | Json] = {"steps": self._steps_by_name()}
        return state | self.errors.state_dict() | self.through.state_dict()

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        self._settle()
        return self.errors.load_targets(saved)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Collective where the errors are another world's."""
        self.errors.load_state_dict(values)
        self.through.load_state_dict(values)
        self._editions = {}
        self._take_steps(values.get("steps", {}))

    def _steps_by_name(self) -> dict[str, int]:
        return {slot.fqn: self._steps.get(unit.key, 0) for unit in self._units for slot in unit.layout.slots}

    def _take_steps(self, steps: Mapping[str, int]) -> None:
        for unit in self._units:
            known = [steps[slot.fqn] for slot in unit.layout.slots if slot.fqn in steps]
            if known:
                self._steps[unit.key] = max(known)


class LoCo(ErrorFeedback):
    """Error feedback whose errors are moving averages, dropped now and then: LoCo.

    As `ErrorFeedback`, with the paper's average of the error (beta) and its reset, which counts the steps of
    each unit. Paper: Xie et al., "LoCo: Low-Bit Communication Adaptor", 2024 (arXiv 2407.04480), algorithm 1;
    errors are kept in fp32 rather than in 8 bits, so that resuming and [Note: nothing is lost for good] are
    exact.
    """

    def __init__(self, through: Codec | TwoHop, *, beta: float = 0.8, reset_steps: int | None = 1024) -> None:
        super().__init__(through, beta=beta, reset_steps=reset_steps)
