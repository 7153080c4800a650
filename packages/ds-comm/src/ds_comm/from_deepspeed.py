"""The optimizers as a DeepSpeed file names them: its parameters and defaults, none of them ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ds_comm.onebit_adam import OnebitAdam
from ds_comm.onebit_lamb import LambCoefficients, OnebitLamb
from ds_comm.zero_one_adam import ZeroOneAdam, ZeroOneSchedule

_NUMBERS: Mapping[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_FREEZE_STEP = 100_000

# Keys that say how DeepSpeed sends, and those whose other values are another algorithm -> what may be said.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "cuda_aware": (True, False),
    "comm_backend_name": ("nccl", "mpi", "hccl", "compressed"),  # ours is torch.distributed's in any case
    "bias_correction": (True,),
    "amsgrad": (False,),
    "eps_inside_sqrt": (False,),
}

T = TypeVar("T", LambCoefficients, ZeroOneSchedule)


def onebit_adam(params: Any, freeze_step: int = _FREEZE_STEP, **given: Any) -> OnebitAdam:
    """OneBitAdam. Raises ValueError for a key that it does not have, or a value that would change it."""
    numbers = _numbers("OneBitAdam", given)
    return OnebitAdam(params, freeze_step=freeze_step, **numbers)


def zero_one_adam(params: Any, var_freeze_step: int = _FREEZE_STEP, **given: Any) -> ZeroOneAdam:
    """ZeroOneAdam. Raises ValueError for a key that it does not have, or a value that would change it."""
    schedule = _taken(ZeroOneSchedule, {**given, "var_freeze_step": var_freeze_step})
    numbers = _numbers("ZeroOneAdam", given, ZeroOneSchedule)
    return ZeroOneAdam(params, schedule=schedule, **numbers)


def onebit_lamb(params: Any, freeze_step: int = _FREEZE_STEP, **given: Any) -> OnebitLamb:
    """OneBitLamb. Raises ValueError for a key that it does not have, or a value that would change it."""
    coefficients = _taken(LambCoefficients, given)
    numbers = _numbers("OneBitLamb", given, LambCoefficients)
    return OnebitLamb(params, freeze_step=freeze_step, coefficients=coefficients, **numbers)


def _taken(kind: type[T], given: Mapping[str, Any]) -> T:
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})


def _numbers(kind: str, given: Mapping[str, Any], *taken: type[T]) -> dict[str, Any]:
    """lr, betas, eps and weight_decay; the defaults are DeepSpeed's. Everything else must be known."""
    known = {*_NUMBERS, *(field.name for one in taken for field in fields(one))}
    for name, value in given.items():
        if name in known:
            continue
        if name not in _FIXED:
            raise ValueError(f"{kind} has no parameter {name!r}; leave it out")
        if value not in _FIXED[name]:
            shown = ", ".join(str(one).lower() for one in _FIXED[name])
            raise ValueError(f"{kind}: {name} is {value!r}; allowed: {shown}")
    numbers = {name: given.get(name, default) for name, default in _NUMBERS.items()}
    return {**numbers, "betas": tuple(float(beta) for beta in numbers["betas"])}
