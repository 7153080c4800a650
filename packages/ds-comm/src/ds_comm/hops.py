"""The two hops between ranks of several nodes, and what ranks must agree on before they take them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ds_comm.agreement import refuse_disagreement
from ds_comm.wire_rows import NotFiniteError, RowCodec
from ds_core.ground.listener import Coding
from ds_core.ground.texts import exchange
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec, Communicator
from ds_core.state.owner import FlatOwner


@dataclass(frozen=True, slots=True)
class Hops:
    """The ranks of this node, and those of this place in every node: rank r is place r % L of node r // L."""

    node: Communicator
    across: Communicator

    @property
    def world(self) -> int:
        return self.node.world * self.across.world

    @property
    def two(self) -> bool:
        """Are there several nodes, of several ranks each?"""
        return self.node.world > 1 and self.across.world > 1

    @property
    def only(self) -> Communicator:
        """Where one hop is all: the group that has the ranks."""
        return self.node if self.node.world > 1 else self.across

    def exchange(self, text: str, device: torch.device, about: str) -> list[str]:
        """Every rank's text, by rank. Collective."""
        here = exchange(self.node, text, device=device, about=about)
        nodes = exchange(self.across, json.dumps(here), device=device, about=about)
        return [each for node in nodes for each in json.loads(node)]


def own(codec: Codec, rank: int) -> Codec:
    """The codec with state of its own, so that no two routes advance the same."""
    return codec.at_rank(rank) if isinstance(codec, RowCodec) else copy.deepcopy(codec)


def join(
    owner: FlatOwner,
    channel: str,
    what: str,
    settings: Mapping[str, Any],
    node_size: int | None,
    *,
    two: bool,
) -> Hops:
    """The hops along the owner's axis, or one, once all ranks have the same settings. Collective."""
    direct = owner.comm if channel == "reduce" else owner.gather_comm
    size = owner.mesh.node_size(owner.axis, node_size) if two else direct.world
    layout = {"axis": owner.axis, "ranks": direct.world, "node_size": size}
    refuse_disagreement(owner.control, {**settings, **layout}, what=what)
    if not two or direct.world == 1:
        return Hops(owner.mesh.alone(), direct)
    return Hops(*owner.mesh.hops(owner.axis, channel, node_size=size))


def mark(codec: Codec, wire: Tensor, numel: int) -> None:
    """If a row of [rows, wire_bytes(numel)] says that something was not finite, all do."""
    if isinstance(codec, RowCodec):
        codec.mark(wire, numel)


def refuse(codec: Codec, wire: Tensor, numel: int) -> None:
    """Raises NotFiniteError where a row of [rows, wire_bytes(numel)] is marked, if the codec is to."""
    if isinstance(codec, RowCodec):
        codec.refuse(wire, numel)


def read(codec: Codec, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Decode; marks give NaN."""
    if isinstance(codec, RowCodec):
        codec.read(wire, out, accumulate=accumulate)
    else:
        codec.decode(wire, out, accumulate=accumulate)


def spread(
    hops: Hops,
    codec: Codec,
    mine: Tensor,
    numel: int,
    put: Callable[[Tensor, int], None],
    *,
    dtype: torch.dtype,
    about: str,
) -> Ticket:
    """Every rank's coded row [wire bytes] to every rank: once between nodes, and on inside each.

    `put` is given the rows of place j in every node, [nodes, wire bytes], and j, once all have been looked
    at. `dtype`: in which the values would travel without a codec, for the communication log.
    """
    nodes, places, width = hops.across.world, hops.node.world, mine.numel()
    column = hops.across.allocate(nodes * width, torch.uint8) if nodes > 1 else mine
    plain = nodes * numel * dtype.itemsize
    with Coding(hops.across, codec, plain).sending():
        first = hops.across.all_gather(column, mine, about=about) if nodes > 1 else Ticket()
    inside = Coding(hops.node if places > 1 else hops.across, codec, places * plain)

    def second() -> None:
        rows = hops.node.allocate(places * nodes * width, torch.uint8) if places > 1 else column
        if places > 1:
            with inside.sending():
                ticket = hops.node.all_gather(rows, column, about=about)
            ticket.wait()
        with inside.decoding():
            refuse(codec, rows.view(-1, width), numel)
            for place, part in enumerate(rows.view(places, nodes, width)):
                put(part, place)

    return Ticket([first], keepalive=(column, mine), finish=second)


def name_not_finite(
    hops: Hops, error: NotFiniteError, what: str, parts: Iterable[tuple[str, Tensor]], device: torch.device
) -> NoReturn:
    """Every rank has seen a mark: raise with the parameters, and the ranks that had them. Collective."""
    bad = [fqn for fqn, values in parts if not bool(torch.isfinite(values).all())]
    texts = hops.exchange(json.dumps(bad), device, "what is not finite")
    found = [f"{fqn} (rank {rank})" for rank, text in enumerate(texts) for fqn in json.loads(text)]
    named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise NotFiniteError(f"{what} of {named or 'a sum over ranks'}: {error}") from error
