"""Activation checkpointing: which blocks are run again in the backward, and what is kept of their inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ds_core.ground.wire import Communicator
from ds_core.state.forwards import Choice, ForwardSwap, choose_blocks

# Makes the saved-tensor hooks that the inputs of one block pass through: PartitionedInputs(comm), or torch's
# own `functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True)` for host memory.
Keeper = Callable[[], AbstractContextManager[Any]]


def checkpoint_blocks(model: nn.Module, which: Choice = None, *, keep: Keeper | None = None) -> ForwardSwap:
    """Keep only the inputs of chosen blocks; what is inside is computed again when the backward needs it.

    `which` is as in `choose_blocks`. Non-reentrant, with the random state of the first run. The blocks' hooks
    are not run again: at stage 3 a block is gathered once for the forward and once for its backward, as
    without checkpointing. `keep` says how positional inputs are kept (None: as they are); tensors given by
    keyword always stay as they are. `remove()` of the result takes it all back.
    Source: Chen et al. 2016 (arXiv:1604.06174).
    """

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def again(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with keep() if keep is not None else nullcontext():
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return again

    return ForwardSwap("recompute").put(choose_blocks(model, which).values(), wrap)


class PartitionedInputs:
    """Each rank of a tensor-parallel group keeps 1/world of an input and gathers it to compute it again.

    For inputs that are the same on all ranks of the group, as those of tensor-parallel blocks are. The parts
    lie in contiguous chunks of `slots` parts each and are used again, step after step, so that they neither
    fragment memory nor ask the allocator. Integers and whatever is smaller than the group stay whole.
    Collective in the backward: over `comm`, which nothing else may use in another order.
    Source: ZeRO-R's partitioned activations (Rajbhandari et al. 2020, section 6.1).
    """

    def __init__(self, comm: Communicator, *, slots: int = 16) -> None:
        if slots < 1:
            raise ValueError(f"a chunk needs at least 1 slot, got {slots}")
        self._comm, self._slots = comm, slots
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self.allocated_bytes = 0  # of all chunks
        self.live_bytes = 0  # of the parts that a backward still waits for

    def __call__(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        world = self._comm.world
        if world == 1 or not tensor.is_floating_point() or tensor.numel() < world:
            return tensor
        numel = math.ceil(tensor.numel() / world)
        part = self._take(numel, tensor.dtype, tensor.device)
        mine = tensor.detach().reshape(-1)[self._comm.rank * numel :][:numel]
        part[: mine.numel()].copy_(mine)
        return _Part(self, part, tensor.shape)

    def _unpack(self, kept: Tensor | _Part) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        flat = self._comm.allocate(kept.part.numel() * self._comm.world, kept.part.dtype)
        self._comm.all_gather(flat, kept.part).wait()
        return flat[: kept.shape.numel()].view(kept.shape)

    def _take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        free = self._free.setdefault((numel, dtype, device), [])
        if not free:
            chunk = torch.zeros(self._slots, numel, dtype=dtype, device=device)
            self.allocated_bytes += chunk.nbytes
            free.extend(chunk.unbind())
        part = free.pop()
        self.live_bytes += part.nbytes
        return part

    def give_back(self, part: Tensor) -> None:
        """The graph that needed a part is gone."""
        self.live_bytes -= part.nbytes
        self._free[part.numel(), part.dtype, part.device].append(part)


class _Part:
    """This rank's part of one input, held by autograd's graph."""

    def __init__(self, home: PartitionedInputs, part: Tensor, shape: torch.Size) -> None:
        self._home, self.part, self.shape = home, part, shape

    def __del__(self) -> None:
        self._home.give_back(self.part)
