"""1-bit Adam: Adam until its variance has come to rest, and from then on momenta of one bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import ParamsT

from ds_comm.freeze import VarianceTest, freeze_rule
from ds_comm.momentum_route import Mode, MomentumRoute
from ds_comm.signs_wire import MomentumWire
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import attached

_GROUP_SETTINGS = ("betas", "eps", "weight_decay", "decoupled_weight_decay")


class OnebitAdam(Adam):
    """Tang et al. 2021, "1-bit Adam", algorithm 1, at stages 0 to 2.

    Warm-up: torch's Adam (AdamW unless `decoupled_weight_decay` is False), to the bit. After `freeze_step`
    steps, or when the variance test says so ("auto"), on all ranks in the same step, the variance stays as it
    is and every rank sends its momentum as signs: 1/26 of the bytes and less. See MomentumRoute.
    Bias correction: the variance keeps the one it has at the freeze, applied to `exp_avg_sq` then; the
    momentum's goes on. An element whose variance is 0 at the freeze, because it never had a gradient, does not
    move any more: nothing is known of its size, and momentum / eps would throw it away.
    Weight decay that is not decoupled joins the gradient before the momentum, in both phases.
    After the freeze the gradient that clipping sees is the momentum: `clip_grad_norm_` then bounds what a
    step applies, and the momentum itself goes on as it was.
    """

    elementwise = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int | Literal["auto"] | VarianceTest,
        decoupled_weight_decay: bool = True,
        wire: MomentumWire | None = None,
    ) -> None:
        self.freeze = freeze_rule(freeze_step)
        self.steps = 0
        self.frozen = False
        self._sizes: list[float] = []  # |v|_1 of the steps that the variance test looks back on
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.route = MomentumRoute(self, wire or MomentumWire())

    # -- what the route asks -------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        return Mode.SIGNS if self.frozen else Mode.PLAIN

    def settings(self) -> Mapping[str, Json]:
        groups = [{name: group[name] for name in _GROUP_SETTINGS} for group in self.param_groups]
        return {"optimizer": type(self).__name__, "freeze_step": repr(self.freeze), "groups": groups}

    def refuse(self, owner: FlatOwner) -> None:
        """Every stage that a route can be at is fine."""

    def momentum(self, piece: Piece) -> Tensor:
        found: Tensor = self._state_of(piece.param)["exp_avg"]
        return found

    def before_sending_(self, unit: FlatUnit, value: Tensor, *, again: bool) -> None:
        """Momenta travel as they are."""

    def after_receiving_(self, unit: FlatUnit, value: Tensor, begin: int) -> None:
        """And arrive so."""

    def counters(self) -> Json:
        return {"steps": self.steps, "frozen": self.frozen, "sizes": list(self._sizes)}

    def load_counters(self, values: Json) -> None:
        found = values or {}
        self.steps, self.frozen = int(found.get("steps", 0)), bool(found.get("frozen", False))
        self._sizes = [float(size) for size in found.get("sizes", [])]

    # -- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Raises RuntimeError where gradients do not come along `route`. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owner = self.route.need()
        if self.frozen:
            self._apply()
        else:
            super().step()
        self.steps += 1
        if not self.frozen and self._is_warm(owner):
            self._freeze()
        return loss

    def _apply(self) -> None:
        """Momenta came as gradients: the step along them, with the variance as it was."""
        for group in self.param_groups:
            lr, beta1 = float(group["lr"]), float(group["betas"][0])
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._state_of(param)
                state["step"] += 1
                apply_frozen_(
                    param, param.grad, state["exp_avg_sq"], group, -lr / (1.0 - beta1 ** float(state["step"]))
                )

    def _is_warm(self, owner: FlatOwner) -> bool:
        if isinstance(self.freeze, int):
            return self.steps >= self.freeze
        beta2 = min(float(group["betas"][1]) for group in self.param_groups)
        size = torch.zeros(1, dtype=torch.float64)
        for piece in attached(self).held.trained:
            state = self.state.get(piece.param, {})
            if state:
                size += state["exp_avg_sq"].sum(dtype=torch.float64).cpu()
        owner.control.all_reduce(size, about="the variance's size").wait()  # at stage 0 world times the same
        self._sizes.append(float(size) / (1.0 - beta2**self.steps))
        del self._sizes[: -1 - self.freeze.steps(beta2)]
        return self.steps >= self.freeze.at_least and self.freeze.has_come_to_rest(self._sizes, beta2)

    def _freeze(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if state:
                    state["exp_avg_sq"].div_(1.0 - float(group["betas"][1]) ** float(state["step"]))
        self.frozen = True
        self._sizes.clear()

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state; zeros where it had no gradient in the warm-up."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)
        return state


def apply_frozen_(
    param: Tensor, momentum: Tensor, variance: Tensor, group: Mapping[str, Any], alpha: float
) -> None:
    """param += alpha * momentum / (sqrt(variance) + eps), 0 where the variance is, after decoupled decay."""
    update = momentum / variance.sqrt().add_(group["eps"])
    update.masked_fill_(variance == 0, 0.0)
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        param.mul_(1.0 - float(group["lr"]) * group["weight_decay"])
    param.add_(update, alpha=alpha)
