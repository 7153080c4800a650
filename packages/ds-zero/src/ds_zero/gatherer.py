"""Whole parameters when they are needed: acquire, prefetch, let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_core.ground.codec import gather_coded
from ds_core.ground.ticket import Ticket
from ds_core.protocols import Codec, Communicator
from ds_core.state.route import ParamRoute
from ds_core.state.store import Away
from ds_core.state.unit import FlatUnit, Whole


@dataclass(slots=True)
class _Fetching:
    """A shard on its way from where it lives, and what takes it to the other ranks once that has begun."""

    unit: FlatUnit
    shard: Tensor
    ticket: Ticket
    sent: Ticket | None = None


class Gatherer:
    """The only code that turns shards into whole parameters. Collective in everything but `release`.

    With `node` (hpZ: Wang et al., "ZeRO++", 2023) what a gather over all ranks brought is kept as a second
    shard, cut over the ranks of this node only, and every further gather until the masters change stays
    inside the node.

    With `away` shards may live elsewhere: each is fetched when its unit is launched, and travels on to the
    other ranks when the next unit is launched or this one is used, whichever comes first. Both happen in
    the same order on every rank.
    """

    def __init__(
        self,
        comm: Communicator,
        codec: Codec | ParamRoute | None,
        *,
        node: Communicator | None = None,
        away: Away | None = None,
    ) -> None:
        self._comm = comm
        self._away = away
        self._fetching: list[_Fetching] = []  # shards on their way here, oldest first
        self._route = codec if isinstance(codec, ParamRoute) else None
        self._codec = None if isinstance(codec, ParamRoute) else codec
        self._node = node
        self._secondary: dict[int, Tensor] = {}  # unit -> its 1/node part of the present values
        self._kept: dict[int, int] = {}  # unit -> which values its second shard is of

    def launch(self, unit: FlatUnit) -> None:
        """Start bringing a unit; nothing to do where it is current or on its way."""
        if unit.state in (Whole.READY, Whole.COMING):
            return
        unit.make_room()
        unit.ticket = self._gather(unit)
        unit.state = Whole.COMING

    def _gather(self, unit: FlatUnit) -> Ticket:
        node, key = self._node, id(unit)
        if node is not None and not unit.keep_whole and self._kept.get(key) == unit.edition:
            return node.all_gather(unit.whole, self._secondary[key], about=unit.about)
        fetched = self._fetch(unit)
        if fetched is not None:
            return fetched
        return self._spread(unit, unit.local)

    def _fetch(self, unit: FlatUnit) -> Ticket | None:
        """Start bringing a shard that lives elsewhere; None where its home is here."""
        if self._away is None or unit.shard_key is None:
            return None
        alone = self._comm.world == 1
        shard = unit.whole if alone else self._comm.allocate(unit.layout.shard_numel, unit.dtype)
        ticket = self._away.fetch(unit.shard_key, shard)
        if ticket is None or alone:
            return ticket
        while self._fetching:
            self._send(self._fetching.pop(0))
        fetching = _Fetching(unit, shard, ticket)
        self._fetching.append(fetching)
        return Ticket(finish=partial(self._finish, fetching))

    def _send(self, fetching: _Fetching) -> None:
        fetching.ticket.wait()
        fetching.sent = self._spread(fetching.unit, fetching.shard)

    def _finish(self, fetching: _Fetching) -> None:
        while fetching.sent is None:
            self._send(self._fetching.pop(0))
        fetching.sent.wait()

    def _spread(self, unit: FlatUnit, shard: Tensor) -> Ticket:
        """From this rank's shard to the whole copy on every rank."""
        lossy, node = unit.dtype.is_floating_point, self._node
        if lossy and unit.keep_whole and (self._codec is not None or self._route is not None):
            # The decoded values overwrite the buffer that the shard is a view of.
            shard = shard.clone()
        if lossy and self._route is not None:
            ticket = self._route.gather(unit, shard)
        else:
            codec = self._codec if lossy else None
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

    def second_shards(self) -> list[Tensor]:
        """What is kept for gathers inside the node."""
        return list(self._secondary.values())

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
