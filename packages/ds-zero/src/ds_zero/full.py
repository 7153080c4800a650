"""Whole parameters for people: to print, compare, export, or write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.layout import Overlap
from ds_core.state.owner import FlatOwner, owner_of
from ds_core.state.unit import FlatUnit, LostWriteError, gather_shards
from ds_core.train.optim import ShardedOptimizer, attached

_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def full_tensor(param: Tensor, *, master: bool = False) -> Tensor:
    """A copy of a parameter's current values, whole, on every rank.

    Shapes: the parameter's own, in its own dtype; with `master` in the dtype that the optimizer updates
    (fp32 in mixed precision).
    Collective at stage 3, and with `master` at every stage: every rank calls it.
    Raises LookupError for a tensor that is no parameter of a sharded model.
    """
    owner = owner_of(param)
    unit, _ = owner.place(param)
    if master:
        owner.settle()
        return _whole(owner, param, unit.values().detach())
    with owner.whole([unit]):
        return param.detach().clone()


def full_grad(param: Tensor) -> Tensor | None:
    """The mean gradient over ranks that the next step will use, whole, in the dtype gradients accumulate in.

    None where no rank has one, and after `zero_grad`. The loss scale, if any, is still in it. What has not
    been reduced is reduced now: call it after the last micro batch. Collective at every stage.
    """
    owner = owner_of(param)
    owner.drain()  # which may cut units anew
    unit, index = owner.place(param)
    if unit.gradient is None or not unit.has_grad[index]:
        return None
    return _whole(owner, param, unit.gradient)


def set_full_grad(param: Tensor, value: Tensor) -> None:
    """`value`, the same on every rank, becomes the gradient of the next step; each rank keeps its part.

    Collective. Raises ValueError on another shape, and when no rank has a gradient to replace.
    """
    owner = owner_of(param)
    owner.drain()
    unit, index = owner.place(param)
    slot = unit.layout.slots[index]
    if unit.gradient is None or not unit.has_grad[index]:
        raise ValueError(f"{slot.fqn} has no gradient to replace: run a backward first")
    _write_part(unit, index, unit.gradient, value)


def set_full_tensor(param: Tensor, value: Tensor) -> None:
    """`value`, the same on every rank, becomes the parameter: master first, then every copy. Collective.

    Raises ValueError on another shape, LookupError for a tensor that is no parameter of a sharded model.
    """
    owner = owner_of(param)
    unit, index = owner.place(param)
    owner.changes.open()
    owner.settle()
    _write_part(unit, index, unit.values(), value)
    unit.refresh_local()
    owner.publish_unit(unit)
    owner.settle()
    unit.note_versions()


def full_optimizer_state(optimizer: Optimizer | ShardedOptimizer, param: Tensor, name: str) -> Tensor | None:
    """A state such as "exp_avg" of a parameter, whole, on every rank; None if unset. Collective."""
    sharded = attached(optimizer)
    sharded.owner.settle()
    dtype, scalar = _agree_on_state(sharded, param, name)
    if dtype is None:
        return None
    if scalar is not None:
        return torch.tensor(scalar, dtype=dtype)
    unit, _ = sharded.owner.place(param)
    shard = torch.zeros(unit.layout.shard_numel, dtype=dtype, device=unit.device)
    for overlap, state in states_here(sharded, param):
        shard[slice(*overlap.local)] = state[name].reshape(-1)
    return _whole(sharded.owner, param, shard)


def set_full_optimizer_state(
    optimizer: Optimizer | ShardedOptimizer, param: Tensor, name: str, value: Tensor
) -> None:
    """`value`, the same on every rank, becomes a state of one parameter; each rank keeps its part.

    Collective. Raises KeyError when there is no such state yet, ValueError on another shape.
    """
    sharded = attached(optimizer)
    sharded.owner.settle()
    unit, index = sharded.owner.place(param)
    slot = unit.layout.slots[index]
    dtype, scalar = _agree_on_state(sharded, param, name)
    if dtype is None:
        raise KeyError(f"{slot.fqn} has no state {name!r}; an optimizer makes it in its first step")
    if value.shape != (() if scalar is not None else slot.shape):
        raise ValueError(
            f"{slot.fqn}/{name} has shape {tuple(slot.shape)}, the new value {tuple(value.shape)}"
        )
    sharded.owner.changes.open()
    for overlap, state in states_here(sharded, param):
        mine = value.reshape(-1)
        if scalar is None:
            mine = mine[overlap.begin : overlap.begin + overlap.local[1] - overlap.local[0]]
        state[name].copy_(mine.view(state[name].shape))


@contextlib.contextmanager
def gather(params: Tensor | nn.Module | Iterable[Tensor], *, write: int | None = None) -> Iterator[None]:
    """These parameters (or all of a module's) are whole and current inside.

    With `write=r` what rank r wrote in place becomes the value everywhere: masters, shards and copies; writes
    of other ranks are dropped. Parameters that share a flat unit with the given ones come along. When the
    body raises nothing is taken. Parameters that were added or replaced inside (resized embeddings, adapters)
    are sharded at the end of the outermost block, with rank 0's values.

    Collective: every rank enters and leaves, at every stage.
    Raises LookupError for a tensor that is no parameter of a sharded model, ValueError for a rank that does
    not exist, LostWriteError when something was written without `write`.
    """
    places = _places(params)
    for owner in places:
        if write is not None and not 0 <= write < owner.everyone.world:
            raise ValueError(f"write must be a rank from 0 to {owner.everyone.world - 1}, got {write!r}")
    with contextlib.ExitStack() as stack:
        for owner, units in places.items():
            stack.enter_context(owner.replanner.block())
            stack.enter_context(owner.whole(units))
        try:
            yield
        except BaseException:
            for unit in (unit for units in places.values() for unit in units if not unit.keep_whole):
                unit.note_versions()  # the body's own error is the one to see
            raise
        for owner, units in places.items():
            if write is not None:
                _take_written(owner, units, root=write)
            for unit in units:
                if (fqn := unit.lost_write()) is not None:
                    raise LostWriteError(fqn)


def _write_part(unit: FlatUnit, index: int, shard: Tensor, value: Tensor) -> None:
    """This rank's part of a whole `value` into `shard` [shard_numel]. Raises ValueError on another shape."""
    slot = unit.layout.slots[index]
    if value.shape != slot.shape:
        raise ValueError(f"{slot.fqn} has shape {tuple(slot.shape)}, the new value {tuple(value.shape)}")
    overlap = unit.layout.overlap(unit.rank, index)
    if overlap is not None:
        low, high = overlap.local
        shard[low:high].copy_(value.detach().reshape(-1)[overlap.begin : overlap.begin + high - low])


def _take_written(owner: FlatOwner, units: Iterable[FlatUnit], *, root: int) -> None:
    """The whole copies on rank `root` become the values of these units everywhere. Collective."""
    owner.changes.open()
    for unit in units:
        owner.everyone.broadcast(unit.whole, root=root, about=unit.about).wait()
        unit.absorb_whole()


def _whole(owner: FlatOwner, param: Tensor, shard: Tensor) -> Tensor:
    """A copy of one parameter's part of all ranks' shards [shard_numel] in a row. Collective."""
    unit, index = owner.place(param)
    slot, flat = unit.layout.slots[index], gather_shards(owner.gather_comm, unit, shard)
    return flat[slot.start : slot.end].clone().view(slot.shape)


def states_here(sharded: ShardedOptimizer, param: Tensor) -> list[tuple[Overlap, dict[str, Any]]]:
    """What this rank's optimizer keeps of one parameter, with the part that it is of."""
    unit, index = sharded.owner.place(param)
    mine = [piece for piece in sharded.pieces if piece.unit is unit and piece.overlap.index == index]
    return [(piece.overlap, sharded.optimizer.state.get(piece.param, {})) for piece in mine]


def _agree_on_state(
    sharded: ShardedOptimizer, param: Tensor, name: str
) -> tuple[torch.dtype | None, float | None]:
    """The dtype of a state on any rank that has some of it, and its value if 0-dim. Collective."""
    states = [state.get(name) for _, state in states_here(sharded, param)]
    held = next((value for value in states if isinstance(value, Tensor)), None)
    seen = torch.zeros(2 + len(_STATE_DTYPES), dtype=torch.float64)
    seen[1] = float("-inf")  # a 0-dim state may be negative
    if held is not None:
        seen[2 + _STATE_DTYPES.index(held.dtype)] = 1.0
        if held.dim() == 0:
            seen[0], seen[1] = 1.0, float(held)
    sharded.owner.control.all_reduce(seen, op="max", about=f"the state {name}").wait()
    dtypes = [dtype for dtype, flag in zip(_STATE_DTYPES, seen[2:].tolist(), strict=True) if flag]
    return (dtypes[0] if dtypes else None), (float(seen[1]) if seen[0] else None)


def _places(params: Tensor | nn.Module | Iterable[Tensor]) -> dict[FlatOwner, list[FlatUnit]]:
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, Tensor):
        params = [params]
    found: dict[FlatOwner, list[FlatUnit]] = {}
    for param in params:
        owner = owner_of(param)
        unit, _ = owner.place(param)
        if unit not in found.setdefault(owner, []):
            found[owner].append(unit)
    return found
