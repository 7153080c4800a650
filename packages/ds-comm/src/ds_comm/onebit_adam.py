"""1-bit Adam: Adam until its variance has come to rest, and from then on momenta of one bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.optim import Adam
from torch.optim.optimizer import ParamsT

from ds_comm.compressed import CompressedOptimizer, decay_, direction, farthest
from ds_comm.compressing import Mode
from ds_comm.freeze import VarianceTest, WarmUp
from ds_comm.momentum_route import MomentumRoute
from ds_comm.signs_wire import MomentumWire
from ds_core.state.shard import Json


class OnebitAdam(CompressedOptimizer, Adam):
    """Tang et al. 2021, "1-bit Adam", algorithm 1, at stages 0 to 2.

    Warm-up: torch's Adam (AdamW unless `decoupled_weight_decay` is False), to the bit. After `freeze_step`
    steps, or when the variance test says so ("auto"), on all ranks in the same step, the variance stays as it
    is and every rank sends its momentum as signs: 1/26 of the bytes and less. See MomentumRoute.
    Bias correction: the variance keeps the one it has at the freeze, applied to `exp_avg_sq` then; the
    momentum's goes on. An element whose variance is 0 at the freeze, because it never had a gradient, does
    not move any more: nothing is known of its size, and momentum / eps would throw it away.
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
        self.warm_up = WarmUp(freeze_step)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.route = MomentumRoute(self, wire or MomentumWire())

    @property
    def frozen(self) -> bool:
        """Has the warm-up ended?"""
        return self.warm_up.over

    # -- what the route asks -------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        return Mode.SIGNS if self.frozen else Mode.PLAIN

    def settings(self) -> Mapping[str, Json]:
        return {**super().settings(), "freeze_step": repr(self.warm_up.rule)}

    def counters(self) -> Json:
        return self.warm_up.counters()

    def load_counters(self, values: Json) -> None:
        self.warm_up.load_counters(values)

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
        if self.warm_up.ends(self, owner):
            self._freeze()
        return loss

    def _apply(self) -> None:
        """Momenta came as gradients: the step along them, with the variance as it was."""
        for group in self.param_groups:
            lr, beta1, limit = float(group["lr"]), float(group["betas"][0]), farthest(group["betas"])
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state_of(param)
                state["step"] += 1
                decay_(param, group)
                update = direction(param.grad, state["exp_avg_sq"], group["eps"], limit)
                param.add_(update, alpha=-lr / (1.0 - beta1 ** float(state["step"])))

    def _freeze(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if state:
                    state["exp_avg_sq"].div_(1.0 - float(group["betas"][1]) ** float(state["step"]))
