"""0/1 Adam: the variance is refreshed ever more rarely, and in the end ranks step alone for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ds_comm.compressed import CompressedOptimizer, decay_, direction, farthest, refuse_numbers
from ds_comm.compressing import Mode
from ds_comm.momentum_route import MomentumRoute
from ds_comm.signs_wire import MomentumWire
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.state.unit import FlatUnit


@dataclass(frozen=True, slots=True)
class ZeroOneSchedule:
    """When gradients travel whole for the variance's sake, and when nothing does. Steps count from 1.

    The variance is refreshed `var_update_scaler` times at intervals of 1 step, then of 2, of 4, and so on,
    never after `var_freeze_step`. After that step ranks synchronise every `local_interval` steps: 1, doubled
    every `local_step_scaler` steps, at most `local_step_clipper`; 1 is no local steps at all.
    """

    var_freeze_step: int
    var_update_scaler: int = 16
    local_step_scaler: int = 32678
    local_step_clipper: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")

    def variance_interval(self, updates: int) -> int:
        """Steps from the `updates`-th refresh (from 0) to the next."""
        return 1 << (updates // self.var_update_scaler)

    def local_interval(self, step: int) -> int:
        """Steps from one synchronisation to the next, as of this step."""
        since = step - self.var_freeze_step - 1
        doublings = min(since // self.local_step_scaler, 30) if since >= 0 else 0
        return min(self.local_step_clipper, 1 << doublings)


class ZeroOneAdam(CompressedOptimizer):
    """Lu et al. 2022, "0/1 Adam", algorithm 1, at stages 0 to 2; local steps at stage 0.

    In steps that refresh the variance gradients travel as in Adam, in all others momenta do as signs (see
    MomentumRoute), or, in local steps, nothing does: each rank goes on by itself from where all were, and at
    the next synchronisation what travels is the mean of its momenta since then, weighted by learning rates.
    All ranks then step from their common parameters along the mean over ranks, and hold the same bits.
    Bias correction, which the paper leaves out: the variance by the number of its refreshes, the momentum by
    steps. Weight decay, clipping, and elements whose variance is 0: as in OnebitAdam; a decoupled decay
    goes on in local steps. Learning rates are read when gradients are reduced: change them after the step.
    Memory in local steps: two more fp32 copies of the parameters, `anchor` and `drift`.
    Between synchronisations ranks hold different parameters, and there is no checkpoint: see `synced`.
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
        schedule: ZeroOneSchedule,
        decoupled_weight_decay: bool = True,
        wire: MomentumWire | None = None,
    ) -> None:
        refuse_numbers(lr, betas, eps, weight_decay)
        self.schedule = schedule
        self.steps = 0
        self.refreshes = 0  # of the variance
        self._next_refresh = 1  # the step of the next one
        self._alone = 0  # steps since all ranks held the same
        self._lengths: list[float] = []  # what momenta were multiplied by since then, one for each group
        self._decays: list[float] = []  # what parameters were multiplied by
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)
        self.route = MomentumRoute(self, wire or MomentumWire())

    @property
    def synced(self) -> bool:
        """Do all ranks hold the same parameters?"""
        return self._alone == 0

    # -- what the route asks -------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        step = self.steps + 1
        if step <= self.schedule.var_freeze_step:
            return Mode.PLAIN if step == self._next_refresh else Mode.SIGNS
        return Mode.SIGNS if self._alone + 1 >= self.schedule.local_interval(step) else Mode.LOCAL

    def settings(self) -> Mapping[str, Json]:
        return {**super().settings(), **asdict(self.schedule)}

    def refuse(self, owner: FlatOwner) -> None:
        if owner.stage > 0 and self.schedule.local_step_clipper > 1:
            raise ValueError(
                f"local steps need all parameters and states on every rank, and stage {owner.stage} cuts "
                "them: use stage 0, or local_step_clipper=1 for the refreshes of the variance alone"
            )

    def before_sending_(self, unit: FlatUnit, value: Tensor, *, again: bool) -> None:
        if self._alone == 0:
            return
        number = {id(p): at for at, group in enumerate(self.param_groups) for p in group["params"]}
        for piece in self.route.pieces(unit):
            at = number[id(piece.param)]
            length = self._length(self.param_groups[at])
            part, drift = value[slice(*piece.overlap.local)], self.state_of(piece.param).get("drift")
            total = self._lengths[at] + length
            if total == 0.0:
                continue
            part.mul_(length)
            if drift is not None and not again:
                part.add_(drift.view(-1))
            part.div_(total)

    def counters(self) -> Json:
        if not self.synced:
            raise RuntimeError(
                f"ranks have stepped alone for {self._alone} steps and hold different parameters: save when "
                f"`optimizer.synced`, every {self.schedule.local_interval(self.steps + 1)} steps now"
            )
        return {"steps": self.steps, "refreshes": self.refreshes, "next_refresh": self._next_refresh}

    def load_counters(self, values: Json) -> None:
        if values is None:  # Adam's checkpoint: each of its steps refreshed the variance
            done = [float(state["step"]) for state in self.state.values() if "step" in state]
            steps = torch.tensor([max(done, default=0.0)])
            self.route.need().control.all_reduce(steps, op="max", about="steps so far").wait()
            values = {"steps": int(steps), "refreshes": int(steps), "next_refresh": int(steps) + 1}
        self.steps, self.refreshes = int(values["steps"]), int(values["refreshes"])
        self._next_refresh, self._alone = int(values["next_refresh"]), 0

    # -- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Raises RuntimeError where gradients do not come along `route`. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.route.need()
        mode = self.mode
        if mode is Mode.LOCAL:
            self.route.spoilt.refuse(self.route.need())
            if self._alone == 0:
                self._lengths = [0.0 for _ in self.param_groups]
                self._decays = [1.0 for _ in self.param_groups]
        if mode is Mode.PLAIN:
            self.refreshes += 1
        for at, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is not None or "anchor" in self.state.get(param, {}):
                    self._update(at, group, param, mode)
        self._count(mode)
        return loss

    def _count(self, mode: Mode) -> None:
        """The step is done."""
        lengths = [self._length(group) for group in self.param_groups]
        self.steps += 1
        if mode is Mode.PLAIN:
            self._next_refresh = self.steps + self.schedule.variance_interval(self.refreshes - 1)
        if mode is not Mode.LOCAL:
            self._alone = 0
            return
        self._alone += 1
        for at, group in enumerate(self.param_groups):
            self._lengths[at] += lengths[at]
            self._decays[at] *= _kept(group)

    def _length(self, group: Mapping[str, Any]) -> float:
        """What the momentum of the step under way is multiplied by."""
        return float(group["lr"]) / (1.0 - float(group["betas"][0]) ** (self.steps + 1))

    def _update(self, at: int, group: dict[str, Any], param: Tensor, mode: Mode) -> None:
        state, length = self.state_of(param), self._length(group)
        if mode is Mode.PLAIN:
            self._refresh_(state, group, param)
        # Momenta as they came, clipped if they were; of a parameter that has no gradient just now, its own.
        momentum = state["exp_avg"] if mode is Mode.PLAIN or param.grad is None else param.grad
        correction = 1.0 - float(group["betas"][1]) ** self.refreshes
        variance, limit = state["exp_avg_sq"] / correction, farthest(group["betas"])
        if mode is Mode.LOCAL:
            if "anchor" not in state:
                state["anchor"], state["drift"] = param.clone(), torch.zeros_like(param)
            state["drift"].add_(momentum, alpha=length)
            update = direction(state["drift"], variance, group["eps"], limit * (self._lengths[at] + length))
            torch.sub(state["anchor"] * (self._decays[at] * _kept(group)), update, out=param)
        elif "anchor" in state:
            update = direction(momentum, variance, group["eps"], limit).mul_(self._lengths[at] + length)
            torch.sub(state["anchor"] * (self._decays[at] * _kept(group)), update, out=param)
            del state["anchor"], state["drift"]
        else:
            decay_(param, group)
            param.add_(direction(momentum, variance, group["eps"], limit), alpha=-length)
        state["step"] += 1

    def _refresh_(self, state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
        """The mean gradient itself came: momentum and variance as in Adam."""
        (beta1, beta2), grad = group["betas"], param.grad
        assert grad is not None
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            grad = grad + group["weight_decay"] * param
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)


def _kept(group: Mapping[str, Any]) -> float:
    """The share of a parameter that a step's decoupled decay leaves."""
    return 1.0 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
