"""The types that rooms meet in: what one room may ask of another, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.ground.ticket import Ticket
from ds_core.state.layout import BucketLayout
from ds_core.state.shard import FlatShard, Json, Saveable, SavedTensor


@runtime_checkable
class Communicator(Protocol):
    """Collectives over one group, asynchronous, on contiguous 1-D tensors.

    Collective: every rank of the group makes the same calls in the same order.
    """

    group: ProcessGroup
    rank: int
    world: int

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A wire buffer on this communicator's device, uninitialised."""
        ...

    def all_gather(self, out: Tensor, shard: Tensor) -> Ticket:
        """[world * n] <- [n]. `shard` may be this rank's part of `out`."""
        ...

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False
    ) -> Ticket:
        """[n] <- [world * n]: this rank's part of the sum over ranks, times `scale`, in `out`'s dtype.

        The wire carries `full`'s dtype. With `accumulate` the result is added to `out`.
        """
        ...

    def all_reduce(self, tensor: Tensor, *, op: str = "sum") -> Ticket:
        """In place; `op` is "sum" or "max"."""
        ...

    def all_to_all(self, out: Tensor, src: Tensor) -> Ticket:
        """[world * n] <- [world * n]: chunk r of `src` goes to rank r."""
        ...

    def broadcast(self, tensor: Tensor, *, root: int = 0) -> Ticket:
        """In place, from `root` (a rank of the group)."""
        ...


class Codec(Protocol):
    """How a tensor looks on the wire: casts, int8, int4 and one bit are all codecs.

    Shapes: [chunks, n] any float dtype <-> [chunks, wire_bytes(n)] uint8
    """

    def wire_bytes(self, numel: int) -> int: ...
    def encode(self, src: Tensor, wire: Tensor) -> None: ...
    def decode(self, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Lease(Protocol):
    """Borrowed bytes: `tensor` is valid inside the `with`; leaving it gives them back, written if `dirty`."""

    tensor: Tensor
    dirty: bool

    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...


class Store(Protocol):
    """Owns named 1-D tensors in some tier: device, pinned host, NVMe, or a policy over several."""

    def create(self, key: str, init: Tensor) -> None: ...
    def prefetch(self, keys: Sequence[str]) -> None: ...
    def lease(self, key: str, device: torch.device) -> Lease: ...
    def bytes_by_tier(self) -> dict[str, int]: ...
    def flush(self) -> None: ...


class Shard(Protocol):
    """One unit's slice of the model on this rank: what the optimizer updates."""

    key: str
    layout: BucketLayout

    @property
    def rank(self) -> int: ...
    def grad(self) -> Tensor | None:
        """[shard_numel], final once the owner has drained."""
        ...

    def drop_grad(self) -> None: ...
    def master(self) -> Lease:
        """[shard_numel] in the optimizer's dtype; publish afterwards."""
        ...


class ParamOwner(Saveable, Protocol):
    """Owns every parameter's bytes between uses. The engine speaks to this, never to buckets."""

    @property
    def shards(self) -> Sequence[Shard]: ...
    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Brackets one forward and backward; `last` says whether the optimizer steps after it."""
        ...

    def drain(self) -> None:
        """All shards' gradients are final after this."""
        ...

    def publish(self, *, wait: bool = True) -> None:
        """Masters changed: refresh what is whole. Without `wait` the next use waits."""
        ...


__all__ = [
    "Codec",
    "Communicator",
    "FlatShard",
    "Json",
    "Lease",
    "ParamOwner",
    "Saveable",
    "SavedTensor",
    "Shard",
    "Store",
    "Ticket",
]
