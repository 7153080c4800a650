"""Global gradient norm over shards, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core.train.optim import ShardedOptimizer, attached


def global_norm(optimizer: ShardedOptimizer) -> Tensor:
    """The 2-norm of the averaged gradient of the whole model, as a 0-dim fp32 tensor on the device.

    Collective: drains, then sums one number over the ranks that hold different shards.
    """
    return square_and_sums(optimizer, None)[0].sqrt().float()


def square_and_sums(optimizer: ShardedOptimizer, sums: Tensor | None) -> Tensor:
    """[1 + n] float64: the squared global norm, and `sums` [n] summed over all ranks in the same message.

    Collective: drains. Without shards every rank knows the norm, and only `sums` travels.
    """
    optimizer.show_grads()
    owner, norms = optimizer.owner, optimizer.norms()
    square = torch.zeros(1, dtype=torch.float64, device=owner.device)
    if norms:
        square = torch.stack(norms).double().square().sum().view(1)
    if owner.sharded:
        square /= owner.everyone.world // owner.comm.world  # every replica adds the same
        message = square if sums is None else torch.cat([square, sums])
        owner.everyone.all_reduce(message, about="the gradient norm").wait()
        return message
    if sums is None:
        return square
    owner.everyone.all_reduce(sums, about="the loss").wait()
    return torch.cat([square, sums])


def clip_grad_norm_(optimizer: Optimizer | ShardedOptimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before.

    The counterpart of `torch.nn.utils.clip_grad_norm_` for a sharded optimizer, with the same coefficient:
    min(1, max_norm / (norm + 1e-6)). Collective.
    """
    sharded = attached(optimizer)
    norm = global_norm(sharded)
    scale_grads_(sharded, clip_coefficient(norm, max_norm))
    return norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), 0-dim."""
    if max_norm <= 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}; leave clipping out instead")
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_grads_(optimizer: ShardedOptimizer, factor: Tensor | float) -> None:
    """Multiply every reduced gradient by a factor, without asking the host where it is a device's tensor."""
    on_host = not isinstance(factor, Tensor) or factor.device.type == "cpu"
    if not (on_host and float(factor) == 1.0):
        optimizer.scale_gradients(factor)


@contextmanager
def scaled_grads(optimizer: ShardedOptimizer, factor: float) -> Iterator[None]:
    """For the step inside, gradients times a factor.

    An optimizer that multiplies gradients as it reads them (`clip_coef`) is told to, which saves a pass over
    memory and the rounding of low precision gradients; for any other they are scaled.
    """
    own = getattr(optimizer.optimizer, "clip_coef", None)
    if own is None:
        scale_grads_(optimizer, factor)
        yield
        return
    reader: Any = optimizer.optimizer
    reader.clip_coef = own * factor
    try:
        yield
    finally:
        reader.clip_coef = own
