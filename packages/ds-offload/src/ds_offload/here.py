"""The device's share of an update, begun before the host's, so that both run at once (Twin-Flow)."""

from __future__ import annotations

from ds_core.train.optim import ShardedOptimizer
from ds_offload.twin import Scaling, Twin


def begin_here(sharded: ShardedOptimizer) -> None:
    """Step every piece that is updated on the device, in its own memory, by the optimizer's rule.

    A GPU is only told to: the host goes on to its own share. The optimizer's own step then finds no gradients
    here either. What its copies and states were it keeps: they are the same tensors.
    """
    elsewhere, optimizer = sharded.elsewhere, sharded.optimizer
    copies = getattr(optimizer, "copy_out", None)
    direct = getattr(optimizer, "low_precision_grads", None)
    # Gradients here were multiplied already by what those elsewhere are still to be multiplied by.
    twin, mine = Twin(optimizer, Scaling.of(optimizer, None, low=False)), []
    for piece in sharded.pieces:
        param = piece.param
        there = elsewhere is not None and elsewhere.has(piece.unit)
        low = None if direct is None else direct.get(param)
        if there or not piece.unit.trainable or (param.grad is None and low is None):
            continue
        mine.append((piece, param))
        if param in optimizer.state:
            twin.optimizer.state[param] = optimizer.state[param]
        if copies is not None and param in copies:
            twin.optimizer.copy_out[param] = copies[param]
        if direct is not None and low is not None:
            twin.optimizer.low_precision_grads[param] = direct.pop(param)
    twin.step(mine)
    for _, param in mine:
        param.grad = None
        optimizer.state[param] = twin.optimizer.state.pop(param, {})
        for lent in (getattr(twin.optimizer, name, None) for name in ("copy_out", "low_precision_grads")):
            if lent is not None:
                lent.pop(param, None)
