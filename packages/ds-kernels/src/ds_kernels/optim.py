"""FusedAdamW and its kin: torch.optim optimizers over the fused steps; torch's own read their checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_kernels.fused import FusedOptimizer, Params
from ds_kernels.ops.optim.rules import AdagradHyper, AdamHyper, Hyper, LambHyper, LionHyper, SgdHyper


class FusedAdam(FusedOptimizer):
    """torch.optim.Adam (weight decay added to the gradient) in one pass; FusedOptimizer has the rest."""

    _states = ("exp_avg", "exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": self._decoupled,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return AdamHyper(
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = self._decoupled


class FusedAdamW(FusedAdam):
    """torch.optim.AdamW (weight decay apart from the gradient) in one pass; FusedOptimizer has the rest."""

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)


class FusedAdagrad(FusedOptimizer):
    """torch.optim.Adagrad in one pass; FusedOptimizer has the rest."""

    _states = ("sum",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        if not initial_accumulator_value >= 0:
            raise ValueError(
                f"FusedAdagrad: initial_accumulator_value={initial_accumulator_value} is not allowed: "
                "it must be >= 0"
            )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        names = ("lr_decay", "eps", "weight_decay", "maximize")
        return AdagradHyper(lr=float(group["lr"]), **{name: group[name] for name in names})

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super()._new_state(param, group)
        state["sum"].fill_(group["initial_accumulator_value"])
        return state


class FusedLion(FusedOptimizer):
    """Lion (Chen et al. 2023): one moment, steps of lr in every element. FusedOptimizer has the rest."""

    _states = ("exp_avg",)
    _counts = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return LionHyper(
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


class FusedSGD(FusedOptimizer):
    """torch.optim.SGD in one pass; FusedOptimizer has the rest."""

    _states = ("momentum_buffer",)
    _counts = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return SgdHyper(lr=float(group["lr"]), **{name: group[name] for name in names})

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return super()._new_state(param, group) if group["momentum"] else {}


class FusedLamb(FusedOptimizer):
    """LAMB (You et al. 2020, algorithm 2), trust ratios within [min_coeff, max_coeff], in two passes.

    Whole parameters only: the length of a step follows from a parameter's norm. FusedOptimizer has the rest.
    """

    elementwise = False
    _states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        names = ("eps", "weight_decay", "max_coeff", "min_coeff", "maximize")
        betas, numbers = group["betas"], {name: group[name] for name in names}
        return LambHyper(lr=float(group["lr"]), beta1=betas[0], beta2=betas[1], **numbers)
