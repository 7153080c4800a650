"""The types that rooms meet in: what one room may ask of another, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec, Communicator
from ds_core.state.layout import BucketLayout
from ds_core.state.shard import FlatShard, Json, Saveable, SavedTensor
from ds_core.state.store import Lease, Store


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
