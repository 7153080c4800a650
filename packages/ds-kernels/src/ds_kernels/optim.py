"""FusedAdamW and FusedAdam: torch.optim optimizers over the fused op; torch's own read their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_kernels.native import DTYPES
from ds_kernels.ops.adam import OP, AdamHyper
from ds_kernels.registry import load

Loss = TypeVar("Loss")
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_MOMENTS = ("exp_avg", "exp_avg_sq")
# How torch's own Adam chooses its implementation; its checkpoints carry these, and here they mean nothing.
_TORCH_SWITCHES = ("foreach", "capturable", "differentiable", "fused", "amsgrad")


class _Slot(NamedTuple):
    """One parameter in one step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    copy: Tensor | None


class FusedAdam(Optimizer):
    """Adam (weight decay added to the gradient) in one pass over memory, with fp32 moments for all dtypes.

    Beside torch.optim.Adam's own surface:
    `copy_out[param]`: a tensor of the same numel, fp32, bf16 or fp16, that gets the new values as well.
    `low_precision_grads[param]`: a gradient used instead of `param.grad`, in any of the three dtypes.
    `grad_scale`: gradients are divided by it (float or one-element tensor; torch's own convention, which
    torch.amp.GradScaler sets and deletes around `step`). `clip_coef`: gradients are multiplied by it.
    `found_inf`: when set and not zero, `step` changes nothing; reading it waits for a GPU.
    """

    elementwise = True  # each element is updated on its own, so parameters may be cut anywhere
    grad_scale: float | Tensor = 1.0
    clip_coef: float | Tensor = 1.0
    found_inf: float | Tensor | None = None
    copy_out: dict[Tensor, Tensor]
    low_precision_grads: dict[Tensor, Tensor]
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to `step`
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
        AdamHyper(lr=float(lr), beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": self._decoupled,
        }
        super().__init__(params, defaults)
        self.copy_out, self.low_precision_grads = {}, {}
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            load("adam", device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does. Raises ValueError for a parameter of an unknown dtype."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in DTYPES:
                self.param_groups.pop()
                raise ValueError(
                    f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is {param.dtype}; "
                    f"allowed are {', '.join(map(str, DTYPES))}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and float(self.found_inf):
            return loss
        coef, one = self._grad_coef(), torch.tensor(1.0)  # a tensor: adding the number wraps it once per step
        for group in self.param_groups:
            hyper = {
                "lr": float(group["lr"]),
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "decoupled": group["decoupled_weight_decay"],
                "maximize": group["maximize"],
            }
            for slots in self._batches(group["params"]):
                steps = [slot.state["step"] for slot in slots]
                OP(
                    [slot.param for slot in slots],
                    [slot.grad for slot in slots],
                    *([slot.state[name] for slot in slots] for name in _MOMENTS),
                    [slot.copy for slot in slots if slot.copy is not None],
                    [int(step) + 1 for step in steps],
                    **hyper,
                    grad_coef=coef,
                )
                torch._foreach_add_(steps, one, alpha=1.0)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's Adam or AdamW. Raises ValueError for an amsgrad state."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError(
                f"{type(self).__name__}: this state was made with amsgrad=True, which is not here; "
                "continue it with torch.optim, or drop `amsgrad` and `max_exp_avg_sq` from it"
            )
        super().load_state_dict(state_dict)
        self._restore_moments(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("copy_out", "low_precision_grads"):  # not part of the state: a copy starts without
            self.__dict__.setdefault(name, {})
        for group in self.param_groups:
            for name in _TORCH_SWITCHES:
                group.pop(name, None)
            group.setdefault("maximize", False)
            group["decoupled_weight_decay"] = self._decoupled

    def _restore_moments(self, saved: dict[str, Any]) -> None:
        """Undo torch's cast of a loaded state to the parameter's dtype; keep steps on the host."""
        keys = (key for group in saved["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for key, param in zip(keys, params, strict=True):
            mine = self.state.get(param)
            if not mine:
                continue
            mine["step"] = torch.as_tensor(mine["step"], dtype=torch.float32).cpu()
            for name in _MOMENTS:
                if mine[name].dtype != torch.float32:
                    mine[name] = saved["state"][key][name].to(param.device, torch.float32, copy=True)

    def _grad_coef(self) -> Tensor | None:
        """clip_coef / grad_scale as one number; None for 1. On a GPU it stays there: nothing waits."""
        clip, scale = self.clip_coef, self.grad_scale
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (clip, scale)):
            coef = clip / scale
            return coef if isinstance(coef, Tensor) else torch.tensor(coef)
        ratio = float(clip) / float(scale)
        return None if ratio == 1.0 else torch.tensor(ratio, dtype=torch.float64)

    def _batches(self, params: list[Tensor]) -> list[list[_Slot]]:
        """The parameters that have a gradient, in lists of one device and one dtype per role."""
        batches: dict[tuple[object, ...], list[_Slot]] = {}
        for param in params:
            grad = self.low_precision_grads.get(param) if self.low_precision_grads else None
            if grad is None:
                grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__}: the gradient of a parameter {tuple(param.shape)} is sparse; "
                    "use torch.optim.SparseAdam for it, or sparse=False in its embedding"
                )
            copy = self.copy_out.get(param) if self.copy_out else None
            state = self.state[param]
            if not state:
                load(
                    "adam", param.device
                )  # the constructor may have seen other parameters: shards replace them
                state["step"] = torch.tensor(0.0)
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(param, dtype=torch.float32)
            key = (param.device, param.dtype, grad.dtype, None if copy is None else copy.dtype)
            batches.setdefault(key, []).append(_Slot(param, grad, state, copy))
        return list(batches.values())


class FusedAdamW(FusedAdam):
    """AdamW (weight decay apart from the gradient) in one pass over memory; FusedAdam has the rest."""

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
