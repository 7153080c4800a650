"""Muon: torch.optim's, with the Gram method, matrices of one shape in one batch, and heads one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from ds_kernels.ops.muon import METHODS, newton_schulz
from ds_kernels.registry import load

Loss = TypeVar("Loss")


class Muon(torch.optim.Muon):
    """Jordan et al. 2024: momentum, orthogonalised. torch.optim.Muon's arguments and checkpoints.

    Groups may say more: `ns_method` "gram" (fewer operations for long matrices) or "standard" as torch's;
    `heads` > 1: the matrix is so many, one below the other, each orthogonalised by itself (the query, key and
    value projections of attention). Whole matrices only; other parameters belong to another optimizer
    (`ds_core.JointOptimizer` makes two of them one). Raises ValueError for parameters that are no matrices.
    """

    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        ns_method: Literal["standard", "gram"] = "standard",
        heads: int = 1,
        **torchs: Any,
    ) -> None:
        self._extra = {"ns_method": ns_method, "heads": heads}
        super().__init__(params, lr, weight_decay, momentum, **torchs)
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            load("muon", device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does. Raises ValueError for options that do not fit its matrices."""
        super().add_param_group({**self._extra, **param_group})
        group = self.param_groups[-1]
        heads, shapes = group["heads"], [tuple(p.shape) for p in group["params"]]
        uneven = [shape for shape in shapes if len(shape) == 2 and (heads < 1 or shape[0] % heads)]
        if uneven or group["ns_method"] not in METHODS:
            self.param_groups.pop()
            raise ValueError(
                f"Muon: a matrix {uneven[0]} is not {heads} heads of the same number of rows"
                if uneven
                else f"Muon: ns_method={group['ns_method']!r}; allowed are {', '.join(METHODS)}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of torch's own has neither
            group.setdefault("ns_method", "standard")
            group.setdefault("heads", 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:  # type: ignore[override]
        """Update every matrix that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[Tensor]] = {}
            for param in cast(list[Tensor], group["params"]):
                if param.grad is not None:
                    alike.setdefault((param.shape, param.dtype, param.device), []).append(param)
            for params in alike.values():
                self._step_alike(params, group)
        return loss

    def _step_alike(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self._buffer(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        rows, columns = params[0].shape
        heads = group["heads"]
        stacked = torch.stack(list(ahead)).view(len(params) * heads, rows // heads, columns)
        found = newton_schulz(
            stacked,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            eps=group["eps"],
            method=group["ns_method"],
        ).view(len(params), rows, columns)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        length = group["lr"] * _ratio(group["adjust_lr_fn"], rows // heads, columns)
        torch._foreach_add_(params, list(found.to(params[0].dtype)), alpha=-length)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        found: Tensor = state["momentum_buffer"]
        return found


def _ratio(rule: str | None, rows: int, columns: int) -> float:
    """How much longer than lr a step is, as torch.optim.Muon has it."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
