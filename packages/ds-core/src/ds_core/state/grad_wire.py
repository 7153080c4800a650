"""How the gradients of one owner travel: plainly, through a codec, or along a route."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ds_core.ground.codec import CastCodec, all_reduce_coded, reduce_coded
from ds_core.ground.listener import Coding
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec
from ds_core.state.groups import DataGroups
from ds_core.state.route import GradientRoute
from ds_core.state.unit import FlatUnit


class GradWire:
    """From a unit's bucket [numel] of this rank's gradients to the mean over all ranks. Collective."""

    def __init__(self, groups: DataGroups, codec: Codec | GradientRoute | None) -> None:
        self._comm = groups.reduce
        self._route = codec if isinstance(codec, GradientRoute) else None
        self._codec = None if isinstance(codec, GradientRoute) else codec
        self._scale = 1.0 / (groups.reduce.world * groups.replicas.world)

    @property
    def whole_grads(self) -> bool:
        """Do gradients have to stay whole until the last micro batch, whatever the stage?"""
        return self._route is not None and self._route.whole_grads

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A bucket, uninitialised."""
        return self._comm.allocate(numel, dtype)

    def dtype(self, unit: FlatUnit) -> torch.dtype:
        """Of a bucket that leaves as soon as it is full."""
        return self._codec.dtype if isinstance(self._codec, CastCodec) else unit.dtype

    def ready(self, unit: FlatUnit, bucket: Tensor) -> Tensor:
        """The bucket in the dtype in which it travels; a codec and a route take any."""
        return bucket if self._codec is not None or self._route is not None else self._plain(unit, bucket)

    def _plain(self, unit: FlatUnit, bucket: Tensor) -> Tensor:
        if bucket.dtype == unit.dtype:
            return bucket
        return self._comm.allocate(bucket.numel(), unit.dtype).copy_(bucket)

    def shard(self, unit: FlatUnit, out: Tensor, bucket: Tensor, *, accumulate: bool) -> Ticket:
        """[shard_numel] <- [numel]: this rank's part."""
        if self._route is not None:
            ticket = self._route.reduce(unit, out, bucket, scale=self._scale, accumulate=accumulate)
            if ticket is not None:
                return ticket
            bucket = self._plain(unit, bucket)
        with self._standing_for(unit):
            return reduce_coded(
                *(self._comm, self._codec, out, bucket),
                scale=self._scale,
                accumulate=accumulate,
                about=unit.about,
            )

    def _standing_for(self, unit: FlatUnit) -> AbstractContextManager[None]:
        """A cast's bucket is filled in the wire's dtype: without a codec it would travel in the unit's."""
        if not isinstance(self._codec, CastCodec):
            return nullcontext()
        return Coding(self._comm, self._codec, unit.layout.numel * unit.dtype.itemsize).sending()

    def whole(self, unit: FlatUnit, bucket: Tensor) -> tuple[Tensor, Ticket]:
        """Where the mean [numel] will be on every rank, and when. The bucket may be overwritten."""
        if self._route is not None:
            mean = self._comm.allocate(bucket.numel(), unit.grad_dtype)
            ticket = self._route.reduce(unit, mean, bucket, scale=self._scale, accumulate=False)
            if ticket is not None:
                return mean, ticket
            bucket = self._plain(unit, bucket)
        if self._codec is not None and not isinstance(self._codec, CastCodec):
            mean, about = self._comm.allocate(bucket.numel(), unit.grad_dtype), unit.about
            return mean, all_reduce_coded(
                self._comm, self._codec, mean, bucket, scale=self._scale, about=about
            )
        if self._codec is not None:
            bucket = bucket.to(self._codec.dtype)
        if self._comm.world > 1:  # divided before the sum, which fp16 might not hold
            bucket.mul_(self._scale)
        with self._standing_for(unit):
            return bucket, self._comm.all_reduce(bucket, about=unit.about)
