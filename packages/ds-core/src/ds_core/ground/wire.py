"""What travels between ranks: the communicator and the codec, as their callers see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket


@runtime_checkable
class Communicator(Protocol):
    """Collectives over one group, asynchronous, on contiguous 1-D tensors.

    Collective: every rank of the group makes the same calls in the same order. `about` says what travels (a
    unit's name and module, for instance): it is part of what ranks must agree on, and of the message when
    they do not.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A wire buffer on this communicator's device, uninitialised."""
        ...

    def all_gather(self, out: Tensor, shard: Tensor, *, about: str = "") -> Ticket:
        """[world * n] <- [n]. `shard` may be this rank's part of `out`."""
        ...

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        """[n] <- [world * n]: this rank's part of the sum over ranks, times `scale`, in `out`'s dtype.

        The wire carries `full`'s dtype. With `accumulate` the result is added to `out`.
        """
        ...

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", about: str = "") -> Ticket:
        """In place; `op` is "sum" or "max"."""
        ...

    def all_to_all(self, out: Tensor, src: Tensor, *, about: str = "") -> Ticket:
        """[world * n] <- [world * n]: chunk r of `src` goes to rank r."""
        ...

    def broadcast(self, tensor: Tensor, *, root: int = 0, about: str = "") -> Ticket:
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
