"""DeepSpeed's names for building, looking at and writing sharded models, on the same functions as ours.

`from ds_zero.compat import Init, GatheredParameters, safe_get_full_fp32_param` in place of `deepspeed.zero`
and `deepspeed.utils`. Unlike there, a tensor that is not sharded raises LookupError in the `safe_*` functions
instead of giving None.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.setup.plugins import find
from ds_core.setup.source import read_layer
from ds_core.state.owner import owner_of
from ds_core.state.unit import FlatUnit
from ds_core.train.optim import ShardedOptimizer, optimizers_of
from ds_zero.deferred import materialize
from ds_zero.full import (
    full_grad,
    full_optimizer_state,
    full_tensor,
    gather,
    set_full_grad,
    set_full_optimizer_state,
    set_full_tensor,
    states_here,
)
from ds_zero.leaf import (
    get_z3_leaf_modules,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "get_z3_leaf_modules",
    "log_summary",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
]

_log = logging.getLogger("ds_zero")

# Arguments of DeepSpeed's zero.Init -> what they are without effect, and why anything else cannot be taken.
_INIT: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_parallel_group": ((None,), "give the mesh to `Zero(...).shard(model, mesh)`"),
    "sequence_data_parallel_group": ((None,), "give the mesh to `Zero(...).shard(model, mesh)`"),
    "mem_efficient_linear": ((None, True, False), "no linear layer is replaced"),
    "remote_device": ((None, "none"), "nothing is offloaded while a model is built; the store does it later"),
    "pin_memory": ((None, False), "parameters have no host memory while a model is built"),
    "mpu": ((None,), "give the mesh to `Zero(...).shard(model, mesh)`"),
    "zero_param_parallel_group": ((None,), "secondary shards are made when the model is sharded"),
    "zero_quantized_nontrainable_weights": ((None, False), "zero_quantized_weights codes frozen ones too"),
    "param_swapper": ((None,), "give a store: `Zero(...).shard(model, store=store)`"),
}


def Init(
    module: nn.Module | None = None,
    *,
    config_dict_or_path: Any = None,
    config: Any = None,
    enabled: bool = True,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> AbstractContextManager[None]:
    """`ds_zero.materialize(dtype=dtype, enabled=enabled)`: models built inside hold no parameters yet.

    The config is accepted for DeepSpeed's callers and not read: it counts where the model is sharded.
    Raises ValueError for an argument that would do something else in DeepSpeed, TypeError for no argument of
    its at all.
    """
    if module is not None:
        raise ValueError(
            "zero.Init cannot take module: a model that is there is cut by `Zero(stage=3).shard(model)`"
        )
    _check_quantized(others.pop("zero_quantized_weights", None), config_dict_or_path or config)
    for name, value in others.items():
        if name not in _INIT:
            known = ", ".join(sorted([*_INIT, "zero_quantized_weights"]))
            raise TypeError(f"zero.Init has no argument {name!r}; it has {known}")
        without_effect, reason = _INIT[name]
        if not any(value is allowed or value == allowed for allowed in without_effect):
            raise ValueError(f"zero.Init cannot take {name}={value!r}: {reason}")
    return materialize(dtype=dtype, enabled=enabled)


def _check_quantized(given: Any, config: Any) -> None:
    """Weights are quantised on their way where the model is sharded, as the config says: it must say so."""
    if given in (None, False):
        return
    if find("route", "quantized_weights") is None:
        raise ValueError("zero.Init(zero_quantized_weights=True) needs ds-comm: pip install ds-comm")
    said = {} if config is None else read_layer(config).values.get("zero_optimization", {})
    if said.get("zero_quantized_weights") is not True:
        raise ValueError(
            "zero.Init cannot take zero_quantized_weights=True alone: say it in the config that Init and "
            "initialize() are given, or `Zero(stage=3).shard(model, gather=ds_comm.QuantizedWeights(codec))`"
        )


@contextlib.contextmanager
def GatheredParameters(
    params: Tensor | nn.Module | Iterable[Tensor],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """`gather(params, write=modifier_rank)`; ordinary tensors among `params` are whole already and ignored.

    `fwd_module` is accepted for DeepSpeed's callers: a unit knows its users. Collective.
    """
    given = list(params.parameters()) if isinstance(params, nn.Module) else params
    listed = [given] if isinstance(given, Tensor) else list(given)
    sharded = [param for param in listed if _is_sharded(param)]
    with gather(sharded, write=modifier_rank) if enabled and sharded else contextlib.nullcontext():
        yield


def _is_sharded(param: Tensor) -> bool:
    try:
        owner_of(param)
    except LookupError:
        return False
    return True


def log_summary(engine: Any, show_straggler: bool = False, return_dict: bool = False) -> Any:
    """What the file's `comms_logger` heard so far: a table in the log of rank 0, or a dict of its rows.

    The engine says whose: there is no log of a whole process here. Rows have bytes before and after coding,
    latency, and bandwidths by the size of the group; with `show_straggler` the slowest rank, and the call is
    collective. Keys of the dict are "axis/op" and, where there is one, "/codec".
    Raises ValueError if `comms_logger` is not on.
    """
    log = engine.owner.mesh.log.listener
    if log is None:
        raise ValueError(
            'log_summary: no communication log is on; set "comms_logger": {"enabled": true}, or make a'
            " ds_comm.CommLog(mesh) before training"
        )
    summary = log.summary(stragglers=show_straggler)
    if return_dict:
        return {"/".join(filter(None, (row.axis, row.op, row.codec))): row for row in summary.rows}
    if engine.owner.everyone.rank == 0:
        _log.info("%s", summary)
    return None


def safe_get_full_fp32_param(param: Tensor) -> Tensor:
    """The master, whole, in fp32. Collective."""
    return full_tensor(param, master=True).float()


def safe_set_full_fp32_param(param: Tensor, value: Tensor) -> None:
    """The same whole `value` on every rank becomes the master and every copy. Collective."""
    set_full_tensor(param, value)


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """The mean gradient, whole; None where there is none. Collective."""
    return full_grad(param)


def safe_set_full_grad(param: Tensor, value: Tensor) -> None:
    """The same whole `value` on every rank becomes the gradient of the next step. Collective."""
    set_full_grad(param, value)


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """A state such as "exp_avg", whole; None before it exists. Collective."""
    found = _with_state(param, optim_state_key)
    return None if found is None else found[1]


def safe_set_full_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """The same whole `value` on every rank becomes the state. Collective. KeyError if there is none."""
    found = _with_state(param, optim_state_key)
    if found is None:
        owner = owner_of(param)
        unit, index = owner.place(param)
        raise KeyError(
            f"no optimizer keeps a state {optim_state_key!r} of {unit.layout.slots[index].fqn} yet"
        )
    set_full_optimizer_state(found[0], param, optim_state_key, value)


def _with_state(param: Tensor, name: str) -> tuple[ShardedOptimizer, Tensor] | None:
    """The first optimizer of the owner that keeps this state, and its whole value. Collective."""
    for sharded in optimizers_of(owner_of(param)):
        value = full_optimizer_state(sharded, param, name)
        if value is not None:
            return sharded, value
    return None


def safe_get_local_fp32_param(param: Tensor) -> Tensor | None:
    """This rank's part of the master, flat and live: [n]; None where the rank holds none of it."""
    unit, index = owner_of(param).place(param)
    return _local(unit, index, unit.values())


def safe_get_local_grad(param: Tensor) -> Tensor | None:
    """This rank's part of the reduced gradient, flat and live; None where there is none. Collective."""
    owner = owner_of(param)
    owner.drain()
    unit, index = owner.place(param)
    if unit.gradient is None or not unit.has_grad[index]:
        return None
    return _local(unit, index, unit.gradient)


def safe_get_local_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """This rank's part of a state, as the optimizer keeps it; None where the rank holds none of it."""
    for sharded in optimizers_of(owner_of(param)):
        for _, state in states_here(sharded, param):
            value = state.get(optim_state_key)
            if isinstance(value, Tensor):
                return value
    return None


def _local(unit: FlatUnit, index: int, shard: Tensor) -> Tensor | None:
    overlap = unit.layout.overlap(unit.rank, index)
    return None if overlap is None else shard[slice(*overlap.local)]
