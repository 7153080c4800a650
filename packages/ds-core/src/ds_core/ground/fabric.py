"""What carries bytes instead of the plain routes, if a package brings it and all ranks of a group have it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor

from ds_core.ground.flight import Flight, Lane
from ds_core.ground.ticket import Waitable

_log = logging.getLogger("ds_core")


class Fabric(Protocol):
    """The collectives of one group, as `Communicator` has them, on contiguous CPU tensors.

    Issuing one does not wait for other ranks. Waiting for it needs of them that they have issued it, and
    raises RuntimeError, naming the rank, when one is gone, has issued something else or is too late. What is
    summed is summed in rank order in the output's dtype: the bits of `sum_chunks`.
    """

    name: str  # how it is called in logs and in `Engine.explain()`

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor: ...

    def all_gather(self, out: Tensor, shard: Tensor, flight: Flight) -> Waitable: ...

    def reduce_scatter(
        self, out: Tensor, full: Tensor, flight: Flight, *, scale: float, accumulate: bool
    ) -> Waitable: ...

    def all_reduce(self, tensor: Tensor, flight: Flight, *, op: str) -> Waitable: ...

    def all_to_all(self, out: Tensor, src: Tensor, flight: Flight) -> Waitable: ...

    def broadcast(self, tensor: Tensor, flight: Flight, *, root: int) -> Waitable: ...

    def close(self) -> None:
        """Tell the others that nothing comes any more; let go of what is theirs."""
        ...


class Connect(Protocol):
    """Entry point `shm` of `ds.communicator`: a fabric for the ranks of one group, or None. Collective.

    `tell(message)` gives every rank's message of up to 512 bytes, by rank. The first message is empty on a
    rank that cannot take part, and then every rank returns None after it. `check` raises when waiting has
    become pointless; whoever waits calls it a few times a second. `timeout_s` bounds a wait.
    """

    def __call__(
        self, *, lane: Lane, rank: int, tell: Callable[[bytes], list[bytes]], timeout_s: float
    ) -> Fabric | None: ...


def connect_fabric(
    lane: Lane, rank: int, tell: Callable[[bytes], list[bytes]], timeout_s: float
) -> Fabric | None:
    """What all ranks of the group agree to use, or None for the plain routes. Collective.

    Raises ValueError when DS_SHM is neither 0 nor 1.
    """
    wanted = os.environ.get("DS_SHM") or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"DS_SHM={wanted!r}: allowed are 0 (sockets only) and 1, or leave it unset")
    connect = _brought() if wanted == "1" else None
    if connect is None:
        tell(b"")
        return None
    fabric = connect(lane=lane, rank=rank, tell=tell, timeout_s=timeout_s)
    _log.debug("%s travels by %s", lane.name, fabric.name if fabric else "sockets")
    return fabric


@cache
def _brought() -> Connect | None:
    """Read once per process."""
    for entry in entry_points(group="ds.communicator", name="shm"):
        connect: Connect = entry.load()
        return connect
    return None
