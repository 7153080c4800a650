"""Whole parameters when they are needed: acquire, prefetch, let go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ds_core.ground.codec import gather_coded
from ds_core.ground.ticket import Ticket
from ds_core.protocols import Codec, Communicator
from ds_core.state.unit import FlatUnit, Whole


class Gatherer:
    """The only code that turns shards into whole parameters. Collective in everything but `release`.

    With `node` (hpZ: Wang et al., "ZeRO++", 2023) what a gather over all ranks brought is kept as a second
    shard, cut over the ranks of this node only, and every further gather until the masters change stays
    inside the node.
    """

    def __init__(self, comm: Communicator, codec: Codec | None, *, node: Communicator | None = None) -> None:
        self._comm = comm
        self._codec = codec
        self._node = node
        self._secondary: dict[int, Tensor] = {}  # unit -> its 1/node part of the present values
        self._kept: dict[int, int] = {}  # unit -> which values its second shard is of

    def launch(self, unit: FlatUnit) -> None:
        """Start bringing a unit; nothing to do where it is current or on its way."""
        if unit.state in (Whole.READY, Whole.COMING):
            return
        whole = unit.make_room()
        unit.ticket = self._gather(unit, whole)
        unit.state = Whole.COMING

    def _gather(self, unit: FlatUnit, whole: object) -> Ticket:
        codec = self._codec if unit.dtype.is_floating_point else None
        node, key = self._node, id(unit)
        if node is not None and not unit.keep_whole and self._kept.get(key) == unit.edition:
            return node.all_gather(unit.whole, self._secondary[key], about=unit.about)
        shard = unit.local
        if codec is not None and unit.keep_whole:
            # The decoded values overwrite the buffer that the shard is a view of.
            shard = shard.clone()
        ticket = gather_coded(self._comm, codec, unit.whole, shard, about=unit.about)
        if node is None or unit.keep_whole:
            return ticket
        return Ticket([ticket], finish=partial(self._keep_secondary, unit, node, unit.edition))

    def _keep_secondary(self, unit: FlatUnit, node: Communicator, edition: int) -> None:
        part = unit.whole.view(node.world, -1)[node.rank]
        if id(unit) not in self._secondary:
            self._secondary[id(unit)] = torch.empty_like(part)
        self._secondary[id(unit)].copy_(part)
        self._kept[id(unit)] = edition

    def acquire(self, unit: FlatUnit) -> None:
        """The unit is whole and current afterwards."""
        self.launch(unit)
        if unit.state is Whole.COMING:
            unit.arrive(unit.ticket)

    def acquire_all(self, units: Sequence[FlatUnit]) -> None:
        """Start all, then wait for all."""
        for unit in units:
            self.launch(unit)
        for unit in units:
            self.acquire(unit)

    def release(self, unit: FlatUnit) -> None:
        """Let the whole copy go, unless this unit keeps it or someone holds it."""
        if not unit.keep_whole and not unit.pinned and unit.state is not Whole.ABSENT:
            unit.let_go()
