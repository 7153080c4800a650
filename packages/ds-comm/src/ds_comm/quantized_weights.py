"""Quantised parameters on their way to every rank: once between nodes, and on inside each (ZeRO++'s qwZ)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_comm.agreement import settings_of
from ds_comm.hops import Hops, join, name_not_finite, own, read, spread
from ds_comm.wire_rows import NotFiniteError
from ds_core.ground.listener import Coding
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit


class QuantizedWeights:
    """A ParamRoute: each rank codes its shard once; it crosses to every other node once, and is spread there.

    All ranks decode all shards, their own too, so all have the same values; masters stay exact. With
    `hierarchical` a rank sends N - 1 coded shards between nodes and N * (L - 1) inside its own, N nodes of L
    ranks; without, (N - 1) * L and L - 1. At stage 3 with `Zero(secondary_shard=True)` (hpZ) what the forward
    gathered is kept inside the node, and the backward's gathers do not leave it.

    Error: the codec's bound of each shard, in the parameters' dtype. Integer units travel as they are.
    Paper: Wang et al., "ZeRO++: Extremely Efficient Collective Communication", 2023, sections 3.1 and 3.2.
    Not finite: NotFiniteError on every rank, with parameter and rank.
    """

    def __init__(self, codec: Codec, *, hierarchical: bool = True, node_size: int | None = None) -> None:
        self._given, self._codec = codec, codec
        self._hierarchical, self._node_size = hierarchical, node_size
        self._hops: Hops | None = None

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on."""
        return {
            "route": type(self).__name__,
            "codec": settings_of(self._given),
            "hierarchical": self._hierarchical,
        }

    def connect(self, owner: FlatOwner) -> None:
        """Collective. Raises ValueError where ranks disagree, nothing is cut, or nodes do not divide."""
        name = type(self).__name__
        if not owner.sharded:
            raise ValueError(f"{name} gathers parameters, and at stage 0 none are cut: use stage 1, 2 or 3")
        if self._hops is None:
            self._codec = own(self._given, owner.everyone.rank)
        self._plain = owner.gather_comm
        what = f"how parameters travel ({name})"
        self._hops = join(owner, "gather", what, self.settings(), self._node_size, two=self._hierarchical)

    @property
    def hops(self) -> Hops:
        if self._hops is None:
            raise RuntimeError("a route carries an owner's parameters: shard a model with it first")
        return self._hops

    def explain(self) -> str:
        """What parameters really do, in one line."""
        hops = self.hops
        if hops.two:
            nodes = f"{hops.across.world} nodes of {hops.node.world} ranks"
            return f"two hops: {self._codec!r}, coded once, between nodes and then inside each; {nodes}"
        why = "as told" if not self._hierarchical else "as there is one node, or one rank on each"
        return f"one hop: {self._codec!r}, {why}; {hops.world} ranks"

    def gather(self, unit: FlatUnit, shard: Tensor) -> Ticket:
        hops, numel = self.hops, unit.layout.shard_numel
        if hops.world == 1 or not unit.dtype.is_floating_point:
            return self._plain.all_gather(unit.whole, shard, about=unit.about)
        return self._spread(unit, shard, shard, numel, accumulate=False)

    def _spread(
        self, unit: FlatUnit, values: Tensor, named: Tensor, numel: int, *, accumulate: bool
    ) -> Ticket:
        """unit.whole <- (or +=) what every rank's `values` [numel] decode to; they are of `named`."""
        hops, codec = self.hops, self._codec
        mine = hops.only.allocate(codec.wire_bytes(numel), torch.uint8)
        with Coding(hops.only, codec, numel * unit.dtype.itemsize).encoding():
            codec.encode(values.view(1, -1), mine.view(1, -1))
        whole = unit.whole.view(hops.across.world, hops.node.world, numel)

        def put(rows: Tensor, place: int) -> None:
            read(codec, rows, whole[:, place], accumulate=accumulate)

        ticket = spread(hops, codec, mine, numel, put, dtype=unit.dtype, about=unit.about)

        def finish() -> None:
            try:
                ticket.wait()
            except NotFiniteError as error:
                parts = unit.layout.overlaps(unit.rank)
                slots = ((part.slot.fqn, named[slice(*part.local)]) for part in parts)
                name_not_finite(hops, error, "the value", slots, unit.device)

        return Ticket(keepalive=(mine, named), finish=finish)

    # -- checkpoints: only rounding by chance has a state ------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        state = self._codec.state_dict()
        return {"codec": state} if state else {}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        return {}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        if "codec" in values:
            self._codec.load_state_dict(values["codec"])
