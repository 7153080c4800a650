"""Which dtype each parameter, master and gradient of a run has (pure)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ds_core.state.units import UnitPlan

_DOT = re.compile(r"\.")


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a run. `param` None leaves every parameter as it is, without masters.

    `keep_fp32`: patterns (as in a shell) of full names of parameters, or of modules and so of all below them,
    that are fp32 whatever `param` says. Parameters of integers or of 8 bits are never cast.
    """

    param: torch.dtype | None = None
    grad: torch.dtype | None = None
    keep_fp32: tuple[str, ...] = ()

    def of_param(self, fqn: str, param: Tensor) -> torch.dtype:
        if self.param is None or not param.dtype.is_floating_point or param.dtype.itemsize < 2:
            return param.dtype
        return torch.float32 if any(_matches(fqn, pattern) for pattern in self.keep_fp32) else self.param

    def of_master(self, plan: UnitPlan) -> torch.dtype:
        cast = self.param is not None and plan.trainable and plan.dtype.is_floating_point
        return torch.float32 if cast and plan.dtype.itemsize < 4 else plan.dtype

    def of_grads(self, plan: UnitPlan) -> torch.dtype:
        return self.grad or self.of_master(plan)

    def refuse_unmatched(self, model: nn.Module) -> None:
        """Raises ValueError naming a pattern that no parameter matches."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for pattern in self.keep_fp32:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"keep_fp32 pattern {pattern!r} matches no parameter; full names are such as {names[0]}, "
                    'and "*norm*" matches a part anywhere'
                )


def _matches(fqn: str, pattern: str) -> bool:
    """Does it match the name of the parameter or of a module around it? "*.norm" also one at the top."""
    names = [fqn[:end] for end in [*(at.start() for at in _DOT.finditer(fqn)), None]]
    return any(fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern) for name in names)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each, 0-dim fp32, summed in fp32; in fp64 where a tensor is."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):  # which torch refuses to sum in fp32
        wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
        norms = [torch._foreach_norm([t], 2, dtype=d)[0] for t, d in zip(tensors, wide, strict=True)]
        return [norm.float() for norm in norms]
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)) if tensors else []
