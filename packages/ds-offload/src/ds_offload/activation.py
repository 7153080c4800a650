"""Activations to host memory or disk while the forward runs, and back ahead of the backward."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ds_core.ground.accelerator import Accelerator
from ds_core.state.forwards import Choice, ForwardSwap, choose_blocks
from ds_offload.activation_ledger import Traffic
from ds_offload.activation_piece import piece_of
from ds_offload.activation_place import DiskTier, HostTier, StreamLane, Tier
from ds_offload.activation_shelf import Saved, Shelf, check_version
from ds_offload.slabs import Slabs
from ds_offload.volume import Volume

MIB = 1 << 20


def offload_activations(
    model: nn.Module,
    to: str | os.PathLike[str] | Volume,
    *,
    min_bytes: int = MIB,
    ahead_bytes: int = 256 * MIB,
    pending_bytes: int = 256 * MIB,
    device: torch.device | None = None,
) -> ActivationOffload:
    """Keep what autograd saves somewhere cheaper than `device`, and bring it back before it is needed.

        offload = offload_activations(model, "nvme:/fast/disk")
        with offload:
            loss = model(batch)
        loss.backward()

    `to` is "host" (pinned memory; for accelerators), "nvme:FOLDER" or a `Volume`. Tensors of `min_bytes` and
    more go, the newest `ahead_bytes` of them only when newer ones push them out; in the backward as many
    bytes are brought back before they are asked for. `pending_bytes` may be on the way out at a time.
    Parameters and buffers of `model`, views of them and what autocast makes of them stay. It is a `keep=` of
    `checkpoint_blocks` as well: then only the inputs of blocks go. Gradients are those without it, to the
    bit, and a saved tensor that was written since is refused, as without it.
    Raises: ValueError for settings that cannot be; in forward and backward OSError of a disk that is full
    or fails.
    Source: `cpu_checkpointing` of DeepSpeed; Arctic Long Sequence Training (arXiv:2506.13996), section 3.3.
    """
    sizes = {"min_bytes": min_bytes, "ahead_bytes": ahead_bytes, "pending_bytes": pending_bytes}
    for name, value in sizes.items():
        least = 0 if name == "ahead_bytes" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: allowed are whole numbers of bytes from {least}")
    device = Accelerator.current().device if device is None else device
    tier = _tier(to, device, ahead_bytes)
    return ActivationOffload(model, Shelf(tier, ahead_bytes, pending_bytes), device, min_bytes)


def offload_blocks(model: nn.Module, offload: ActivationOffload, which: Choice = None) -> ForwardSwap:
    """Offload what chosen blocks save, and nothing else; `which` is as in `choose_blocks`.

    Put `checkpoint_blocks` and `compile_blocks` on first, if at all. `remove()` of the result takes it back.
    """

    swap = ForwardSwap("activations away")
    for block in choose_blocks(model, which).values():
        swap.put([block], functools.partial(_away, offload, block))
    return swap


def _away(offload: ActivationOffload, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def away(*args: Any, **kwargs: Any) -> Any:
        with offload.hooks(tensors_of(block)):
            return forward(*args, **kwargs)

    return away


class ActivationOffload:
    """Made by `offload_activations`: a context manager around forwards, as often as one likes, also nested.

    Calling it makes saved-tensor hooks, for one use each. What a graph saved lives as long as the graph, in
    the tier as it would in memory. Under `torch.no_grad` nothing is saved and nothing is done.
    """

    def __init__(self, model: nn.Module, shelf: Shelf, device: torch.device, min_bytes: int) -> None:
        self._model, self._shelf = model, shelf
        self._device, self._min_bytes = device, min_bytes
        self._own = tensors_of(model)
        self._entered: list[saved_tensors_hooks] = []

    def __call__(self) -> saved_tensors_hooks:
        return self.hooks(self._own)

    def hooks(self, own: Sequence[Tensor]) -> saved_tensors_hooks:
        """Hooks that leave the memory of these tensors where it is."""
        return saved_tensors_hooks(functools.partial(self._pack, own), self._unpack)

    def __enter__(self) -> ActivationOffload:
        self._own = tensors_of(self._model)  # a sharded model may have changed between two steps
        hooks = self()
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *problem: Any) -> None:
        self._entered.pop().__exit__(*problem)

    def traffic(self) -> Traffic:
        """What was moved so far, and what is where now."""
        return self._shelf.traffic()

    def settle(self) -> None:
        """Wait for what is on the way out; give back the space kept for the next step. Raises: OSError."""
        self._shelf.settle()

    def close(self) -> None:
        """Let go of the disk. A graph that still needs it raises in its backward; again is harmless."""
        self._shelf.close()

    def _pack(self, own: Sequence[Tensor], tensor: Tensor) -> _Stayed | Saved:
        if self._moves(tensor):
            saved = self._shelf.find(tensor)
            if saved is not None:
                return saved
            if tensor.nbytes >= self._min_bytes and not _is_own(tensor, own):
                piece = piece_of(tensor)
                if piece is not None:
                    return self._shelf.put(tensor, piece)
        return _Stayed(tensor if tensor.is_leaf else tensor.detach(), tensor)

    def _unpack(self, packed: _Stayed | Saved) -> Tensor:
        return self._shelf.get(packed) if isinstance(packed, Saved) else packed.get()

    def _moves(self, tensor: Tensor) -> bool:
        """Is it plain bytes on our device, in a storage that is worth it?"""
        return (
            type(tensor) is Tensor
            and tensor.device.type == self._device.type
            and tensor.layout == torch.strided
            and not (tensor.is_nested or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
            and tensor.numel() > 0
            and tensor.untyped_storage().nbytes() >= self._min_bytes
        )


class _Stayed:
    """A saved tensor that stays as it is, with the check of its version, which autograd leaves to hooks."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, kept: Tensor, tensor: Tensor) -> None:
        self._tensor, self._version = kept, tensor._version

    def get(self) -> Tensor:
        check_version(self._tensor, self._version)
        return self._tensor


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def _is_own(tensor: Tensor, own: Sequence[Tensor]) -> bool:
    """Is it a parameter's or a buffer's memory, or what autocast made of a parameter?

    Those are no activations. A sharded unit's memory could even go while it is being written out.
    """
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter) or _is_cast(base):
        return True
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    end = begin + storage.nbytes()
    with torch._C.DisableTorchFunctionSubclass():  # an absent parameter answers, too
        return any(begin <= one.data_ptr() < end for one in own)


def _is_cast(tensor: Tensor) -> bool:
    """Is it a parameter in another dtype?"""
    cast = tensor.grad_fn
    if cast is None or cast.name() != "ToCopyBackward0":
        return False
    return isinstance(getattr(cast.next_functions[0][0], "variable", None), nn.Parameter)


def _tier(to: str | os.PathLike[str] | Volume, device: torch.device, ahead_bytes: int) -> Tier:
    lane = None if device.type == "cpu" else StreamLane(device)
    slabs = Slabs(keep_bytes=ahead_bytes)
    if isinstance(to, Volume):
        return DiskTier(to, lane, slabs, own=False)
    kind, _, folder = os.fspath(to).partition(":")
    if kind == "nvme" and folder:
        return DiskTier(Volume(folder), lane, slabs, own=True)
    if os.fspath(to) != "host":
        raise ValueError(f'to={to!r}: allowed are "host", "nvme:FOLDER" and a Volume')
    if lane is None:
        raise ValueError('to="host": activations on a CPU are in host memory already; give "nvme:FOLDER"')
    return HostTier(lane)
