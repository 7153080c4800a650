"""What the optimizers whose momenta travel as signs have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_comm.compressing import Mode
from ds_comm.momentum_route import MomentumRoute
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece

_GROUP_SETTINGS = ("betas", "eps", "weight_decay", "decoupled_weight_decay")


class CompressedOptimizer(Optimizer):
    """The answers that a MomentumRoute asks for, for momenta that travel as they are.

    States by parameter: `step`, `exp_avg` and `exp_avg_sq`, as torch's Adam has them.
    """

    route: MomentumRoute
    preconditions = True

    @property
    def mode(self) -> Mode:
        raise NotImplementedError

    def settings(self) -> Mapping[str, Json]:
        names = [name for name in _GROUP_SETTINGS if name in self.defaults]
        groups = [{name: group[name] for name in names} for group in self.param_groups]
        return {"optimizer": type(self).__name__, "groups": groups}

    def refuse(self, owner: FlatOwner) -> None:
        """Every stage that a route can be at is fine."""

    def receive_(self, piece: Piece, momentum: Tensor, *, again: bool) -> None:
        """This rank's part of the new momentum, flat; `again`: what has to be added to it."""
        state = self.state_of(piece.param)["exp_avg"].view(-1)
        if again:
            state.add_(momentum)
        else:
            state.copy_(momentum)

    def momentum(self, piece: Piece) -> Tensor:
        found: Tensor = self.state_of(piece.param)["exp_avg"]
        return found

    def variance(self, piece: Piece) -> Tensor:
        found: Tensor = self.state_of(piece.param)["exp_avg_sq"]
        return found

    def before_sending_(self, unit: FlatUnit, value: Tensor, *, again: bool) -> None:
        """Momenta travel as they are."""

    def after_receiving_(self, unit: FlatUnit, value: Tensor, begin: int) -> None:
        """And arrive so."""

    def counters(self) -> Json:
        raise NotImplementedError

    def load_counters(self, values: Json) -> None:
        raise NotImplementedError

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state; zeros where it had no gradient so far."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)
        return state


def direction(momentum: Tensor, variance: Tensor, eps: float, limit: float) -> Tensor:
    """momentum / (sqrt(variance) + eps) within +-limit; 0 where the variance is, for want of any gradient.

    [Note: no farther than Adam] One bit gives every element of a block the same size, so where the variance
    is small, in rows of an embedding that are seldom asked for, the quotient has no bound of its own.
    """
    return (momentum / variance.sqrt().add_(eps)).clamp_(-limit, limit).masked_fill_(variance == 0, 0.0)


def farthest(betas: tuple[float, float]) -> float:
    """How far in learning rates Adam can move an element in a step (Kingma & Ba 2015, section 2.1)."""
    beta1, beta2 = betas
    return max(1.0, (1.0 - beta1) / math.sqrt(1.0 - beta2))


def decay_(param: Tensor, group: Mapping[str, Any]) -> None:
    """AdamW's decoupled weight decay."""
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        param.mul_(1.0 - float(group["lr"]) * group["weight_decay"])


def refuse_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises ValueError naming the number and what it may be."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
