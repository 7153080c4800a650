"""Global gradient norm over shards, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core.train.optim import ShardedOptimizer, attached


def global_norm(optimizer: ShardedOptimizer) -> Tensor:
    """The 2-norm of the averaged gradient of the whole model, as a 0-dim fp32 tensor on the device.

    Collective: drains, then sums one number over the ranks that hold different shards.
    """
    optimizer.show_grads()
    owner = optimizer.owner
    norms = (
        torch._foreach_norm(optimizer.gradients(), 2, dtype=torch.float32) if optimizer.gradients() else []
    )
    total = torch.zeros((), dtype=torch.float32, device=owner.device)
    if norms:
        total = torch.stack(list(norms)).square().sum()
    if owner.sharded:
        owner.comm.all_reduce(total.view(1)).wait()
    return total.sqrt()


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


def scale_grads_(optimizer: ShardedOptimizer, factor: Tensor) -> None:
    """Multiply every reduced gradient by a 0-dim factor, without asking the host (on CPU: not by 1)."""
    gradients = optimizer.gradients()
    if not gradients or (factor.device.type == "cpu" and float(factor) == 1.0):
        return
    torch._foreach_mul_(gradients, factor)
