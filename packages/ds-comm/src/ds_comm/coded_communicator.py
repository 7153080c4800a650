"""A communicator that puts a codec between its caller and another communicator."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_core.ground.codec import all_reduce_coded, gather_coded, reduce_coded
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec, Communicator


class CodedCommunicator:
    """A Communicator over a Communicator, for loops of your own: `CodedCommunicator(comm, reduce=Int8())`.

    `gather` codes what is gathered, `reduce` what is summed: each part is coded once, sent to who sums it,
    and decoded and summed in the output's dtype. An all-reduce with "sum" is both in turn, `reduce` in each
    direction. Broadcasts, all-to-alls, maxima and integers pass as they are. Every rank of the group wraps
    its communicator with the same codecs.
    """

    def __init__(
        self, comm: Communicator, *, gather: Codec | None = None, reduce: Codec | None = None
    ) -> None:
        self._comm, self._gather, self._reduce = comm, gather, reduce

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def world(self) -> int:
        return self._comm.world

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._comm.allocate(numel, dtype)

    def all_gather(self, out: Tensor, shard: Tensor, *, about: str = "") -> Ticket:
        """[world * n] <- [n], decoded on every rank, the own part too: all ranks hold the same."""
        codec = self._gather if shard.is_floating_point() else None
        return gather_coded(self._comm, codec, out, shard, about=about)

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        codec = self._reduce if full.is_floating_point() else None
        return reduce_coded(self._comm, codec, out, full, scale=scale, accumulate=accumulate, about=about)

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", about: str = "") -> Ticket:
        if self._reduce is None or op != "sum" or not tensor.is_floating_point():
            return self._comm.all_reduce(tensor, op=op, about=about)
        flat = tensor.view(-1)
        return all_reduce_coded(self._comm, self._reduce, flat, flat.clone(), scale=1.0, about=about)

    def all_to_all(self, out: Tensor, src: Tensor, *, about: str = "") -> Ticket:
        return self._comm.all_to_all(out, src, about=about)

    def broadcast(self, tensor: Tensor, *, root: int = 0, about: str = "") -> Ticket:
        return self._comm.broadcast(tensor, root=root, about=about)
