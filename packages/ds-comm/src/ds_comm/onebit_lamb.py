"""1-bit LAMB: LAMB until its variance rests, then momenta of one bit and layer-wise rates that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ds_comm.compressed import CompressedOptimizer, direction, farthest, refuse_numbers
from ds_comm.compressing import Mode
from ds_comm.freeze import VarianceTest, WarmUp
from ds_comm.momentum_route import MomentumRoute
from ds_comm.signs_wire import MomentumWire
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import attached


@dataclass(frozen=True, slots=True)
class LambCoefficients:
    """How layer-wise rates are bounded in the warm-up, and how they follow the variance after it.

    `max_coeff`, `min_coeff` hold |weights| / |update|; `coeff_beta` averages it over the warm-up. After the
    freeze it is multiplied by a factor within [factor_min, factor_max] that changes by at most
    `factor_threshold` of itself from step to step.
    """

    max_coeff: float = 10.0
    min_coeff: float = 0.01
    coeff_beta: float = 0.9
    factor_max: float = 4.0
    factor_min: float = 0.5
    factor_threshold: float = 0.1

    def __post_init__(self) -> None:
        for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                given = f"{getattr(self, low)} and {getattr(self, high)}"
                raise ValueError(f"{low} must be above 0 and at most {high}, got {given}")
        if not 0 <= self.coeff_beta < 1:
            raise ValueError(f"coeff_beta must be in [0, 1), got {self.coeff_beta}")
        if not self.factor_threshold > 0:
            raise ValueError(f"factor_threshold must be above 0, got {self.factor_threshold}")


class OnebitLamb(CompressedOptimizer):
    """Li et al. 2021, "1-bit LAMB", algorithm 1, at stages 0 to 2, with whole parameters where they are cut.

    Warm-up: LAMB (You et al. 2020), with bias correction and decoupled weight decay inside the update. At the
    freeze, the same on all ranks: the variance stays; of each parameter's coefficient the mean over the
    warm-up is kept (corrected for its start at 0); each parameter's momentum gets a scale that makes all of
    them of one size where they share those of signs. From then on a fresh variance is kept of the gradients
    that momenta imply, and the largest ratio of frozen to fresh bounds how much a layer's rate may grow.
    Bias correction, clipping and elements whose variance is 0: as in OnebitAdam.
    """

    elementwise = False
    preconditions = False  # layers have scales instead

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        freeze_step: int | Literal["auto"] | VarianceTest,
        coefficients: LambCoefficients | None = None,
        wire: MomentumWire | None = None,
    ) -> None:
        refuse_numbers(lr, betas, eps, weight_decay)
        self.warm_up = WarmUp(freeze_step)
        self.coefficients = coefficients or LambCoefficients()
        self.scales: dict[str, float] = {}  # what momenta are multiplied by on the wire, by parameter
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
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
        return {**super().settings(), "freeze_step": repr(self.warm_up.rule), **asdict(self.coefficients)}

    def receive_(self, piece: Piece, momentum: Tensor, *, again: bool) -> None:
        """The gradient that it implies goes into the fresh variance; the share that came late does not."""
        state = self.state_of(piece.param)
        if not again:
            beta1, beta2 = self._group_of(piece.param)["betas"]
            implied = (momentum.view_as(state["exp_avg"]) - state["exp_avg"] * beta1).div_(1.0 - beta1)
            if "fresh_avg_sq" not in state:  # its first gradient
                state["fresh_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
            state["fresh_avg_sq"].mul_(beta2).addcmul_(implied, implied, value=1.0 - beta2)
        super().receive_(piece, momentum, again=again)

    def before_sending_(self, unit: FlatUnit, value: Tensor, *, again: bool) -> None:
        for slot in unit.layout.slots:
            value[slot.start : slot.end].mul_(self.scales.get(slot.fqn, 1.0))

    def after_receiving_(self, unit: FlatUnit, value: Tensor, begin: int) -> None:
        for slot in unit.layout.slots:
            start, end = max(slot.start - begin, 0), min(slot.end - begin, value.numel())
            if start < end:
                value[start:end].div_(self.scales.get(slot.fqn, 1.0))

    def counters(self) -> Json:
        return {**self.warm_up.counters(), "scales": dict(self.scales)}

    def load_counters(self, values: Json) -> None:
        self.warm_up.load_counters(values)
        self.scales = {name: float(scale) for name, scale in (values or {}).get("scales", {}).items()}

    # -- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Raises RuntimeError where gradients do not come along `route`. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owner = self.route.need()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state_of(param)
                    state["step"] += 1
                    update = self._follow if self.frozen else self._warm
                    update(param, param.grad, state, group)
        if self.warm_up.ends(self, owner):
            self._freeze(owner)
        return loss

    def _warm(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """LAMB."""
        (beta1, beta2), step, limits = group["betas"], float(state["step"]), self.coefficients
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denom = state["exp_avg_sq"].sqrt().mul_((1.0 - beta2**step) ** -0.5).add_(group["eps"])
        update = state["exp_avg"] / (1.0 - beta1**step) / denom
        update.add_(param, alpha=group["weight_decay"])
        ratio = (param.norm() / update.norm()).clamp(limits.min_coeff, limits.max_coeff)
        ratio = torch.where((param.norm() > 0) & (update.norm() > 0), ratio, 1.0)
        mean = state.setdefault("coefficient", torch.zeros((), device=param.device))
        mean.mul_(limits.coeff_beta).add_(ratio, alpha=1.0 - limits.coeff_beta)
        param.sub_(update * (float(group["lr"]) * ratio))

    def _follow(
        self, param: Tensor, momentum: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        """LAMB with a variance that stays, and a coefficient that follows the fresh one."""
        beta1, limits = group["betas"][0], self.coefficients
        limit = farthest(group["betas"])
        momentum = momentum / (1.0 - beta1 ** float(state["step"]))
        alone = direction(momentum, state["exp_avg_sq"], group["eps"], limit)
        update = alone.add(param, alpha=group["weight_decay"])
        frozen, fresh = state["exp_avg_sq"].sqrt(), state["fresh_avg_sq"].sqrt()
        factor = ((frozen + group["eps"]) / (fresh + group["eps"])).max()
        if group["weight_decay"]:
            share = (alone.norm() / update.norm()).clamp(max=1.0).nan_to_num(1.0)
            factor = factor * share + (1.0 - share)
        factor = factor.clamp(limits.factor_min, limits.factor_max)
        last = state.setdefault("factor", torch.ones((), device=param.device))
        low, high = last * (1.0 - limits.factor_threshold), last * (1.0 + limits.factor_threshold)
        last.copy_(torch.minimum(torch.maximum(factor, low), high))
        coefficient = state.setdefault("coefficient", torch.ones((), device=param.device))
        param.sub_(update * (float(group["lr"]) * coefficient * last))

    def _freeze(self, owner: FlatOwner) -> None:
        """Variances and coefficients are corrected for their start; momenta get their scales. Collective."""
        names = [slot.fqn for unit in owner.trainable for slot in unit.layout.slots]
        sizes = torch.zeros(len(names), dtype=torch.float64)
        at = {name: number for number, name in enumerate(names)}
        for piece in attached(self).held.trained:
            state, beta2 = self.state.get(piece.param, {}), self._group_of(piece.param)["betas"][1]
            if not state:
                continue
            step = float(state["step"])
            state["exp_avg_sq"].div_(1.0 - beta2**step)
            state["coefficient"].div_(1.0 - self.coefficients.coeff_beta**step)
            state["fresh_avg_sq"] = state["exp_avg_sq"].clone()
            sizes[at[piece.fqn]] = state["exp_avg"].double().square().mean().sqrt()
        owner.control.all_reduce(sizes, op="max", about="sizes of momenta").wait()
        known = sizes[sizes > 0]
        united = float(known.mean()) if known.numel() else 1.0
        self.scales = {
            name: united / size if size > 0 else 1.0 for name, size in zip(names, sizes.tolist(), strict=True)
        }

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(one is param for one in group["params"]))
