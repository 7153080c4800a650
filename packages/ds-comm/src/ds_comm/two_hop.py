"""Quantised gradients in two hops: inside the node, then between nodes (ZeRO++'s qgZ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_comm.agreement import settings_of
from ds_comm.block_codecs import BlockCodec
from ds_comm.hops import Hops, join, mark, name_not_finite, own, read, refuse, spread
from ds_comm.wire_rows import NotFiniteError, put, sum_rows
from ds_core.ground.listener import Coding
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit


class TwoHop:
    """A GradientRoute: `intra` carries gradients between ranks of a node, `inter` their sums between nodes.

    With N nodes of L ranks, chunk c = i * L + j is to end at rank c, place j of node i. First place j of each
    node gets the chunks of all places j, from every rank of its node, and sums them in fp32; then each sum
    goes to its node. Chunks are coded from where they lie and land where they belong: there is no reorder
    pass. Where both codecs have the same blocks, sums are coded in the pass that makes them.

    Bytes that a rank sends of a unit of n elements: N * (L - 1) chunks of n / (N * L) inside the node, and N
    - 1 between nodes, where one hop would send (N - 1) * L. Where all ranks are on one node, or each on its
    own, there is one hop, with the codec of that hop; `explain` says which.

    At stage 0, where every rank needs all of the mean, its chunks come back by `inter` the other way.
    Error: what `intra` bounds for each rank's gradient, and `inter` for each node's sum, added up.
    Paper: Wang et al., "ZeRO++: Extremely Efficient Collective Communication", 2023, sections 3.3 and 4.
    Not finite: NotFiniteError on every rank, with parameter and rank, unless the codecs say nonfinite="mark".
    """

    def __init__(self, intra: Codec, inter: Codec, *, node_size: int | None = None) -> None:
        self._codecs = (intra, inter)
        self._node_size = node_size
        self._intra, self._inter = intra, inter
        self._hops: Hops | None = None
        self._sharded = True

    whole_grads = False
    _two = True

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on."""
        return {"route": type(self).__name__, "codecs": [settings_of(codec) for codec in self._codecs]}

    def connect(self, owner: FlatOwner, settings: Mapping[str, Any] | None = None) -> None:
        """Collective. Raises ValueError where ranks disagree, or the axis does not divide into nodes.

        `settings`: those of a route that sends through this one.
        """
        if self._hops is None:
            self._intra, self._inter = (own(codec, owner.everyone.rank) for codec in self._codecs)
        self._sharded = owner.sharded
        what = f"how gradients travel ({type(self).__name__})"
        agreed = settings or self.settings()
        self._hops = join(owner, "reduce", what, agreed, self._node_size, two=self._two)

    @property
    def hops(self) -> Hops:
        if self._hops is None:
            raise RuntimeError("a route carries an owner's gradients: shard a model with it first")
        return self._hops

    def explain(self) -> str:
        """What gradients really do, in one line."""
        hops = self.hops
        size = f"{hops.across.world} nodes of {hops.node.world} ranks"
        if hops.two:
            return f"two hops: {self._intra!r} inside the node, {self._inter!r} between nodes; {size}"
        if hops.world == 1:
            return "no hop: there is one rank"
        why = "all ranks are on one node" if hops.across.world == 1 else "each rank is a node of its own"
        return f"one hop: {self._last!r}, as {why if self._two else 'told'}; {hops.world} ranks"

    @property
    def _last(self) -> Codec:
        """What the last hop is coded with."""
        return self._intra if self.hops.across.world == 1 else self._inter

    def reduce(self, unit: FlatUnit, out: Tensor, full: Tensor, *, scale: float, accumulate: bool) -> Ticket:
        return self.send(unit, out, full, full, scale=scale, accumulate=accumulate)

    def room(self, numel: int) -> int:
        """Elements of a buffer that divides into a chunk for every rank."""
        return -(-numel // self.hops.world) * self.hops.world

    def send(
        self,
        unit: FlatUnit,
        out: Tensor,
        values: Tensor,
        full: Tensor,
        *,
        scale: float,
        accumulate: bool,
        lost: Callable[[Tensor], None] | None = None,
    ) -> Ticket:
        """`reduce` of `values` [room(numel)], which come of the gradients `full`.

        With `lost`, `values` are fp32 and become what coding lost of this rank's contribution, of its node's
        sums and of what it spreads; `lost` gets them at the end. The sum over ranks of what is lost is what
        lacks in the sum over ranks that everybody receives.
        """
        hops = self.hops
        nodes, places, world = hops.across.world, hops.node.world, hops.world
        if world == 1:
            ticket = hops.node.reduce_scatter(out, values[: full.numel()], scale=scale, accumulate=accumulate)
            ticket.wait()
            if lost is not None:
                lost(values.zero_())
            return ticket
        if values.numel() != self.room(full.numel()):
            values = torch.nn.functional.pad(values, (0, self.room(full.numel()) - values.numel()))
        numel = values.numel() // world
        first = self._intra if hops.two else self._last
        groups = (
            values.view(nodes, places, numel).transpose(0, 1) if hops.two else values.view(1, world, numel)
        )
        comm, width = hops.node if hops.two else hops.only, first.wire_bytes(numel)
        sent = comm.allocate(world * width, torch.uint8)
        coding = Coding(comm, first, world * numel * full.dtype.itemsize)
        with coding.encoding():
            for chunks, rows in zip(groups, sent.view(*groups.shape[:2], width), strict=True):
                first.encode(chunks, rows)
            mark(first, sent.view(world, width), numel)
        if lost is not None:
            for chunks, rows in zip(groups, sent.view(*groups.shape[:2], width), strict=True):
                chunks.sub_(_decoded(first, rows, numel))
        received = comm.allocate(world * width, torch.uint8)
        with coding.sending():
            ticket = comm.all_to_all(received, sent, about=unit.about)

        def finish() -> None:
            ticket.wait()
            loss = groups[hops.node.rank] if lost is not None and hops.two else None
            rows = (
                self._between_nodes(unit, received, numel, loss) if hops.two else received.view(world, width)
            )
            try:
                refuse(self._last, rows, numel)
                if self._sharded:
                    with coding.decoding():
                        sum_rows(self._last, rows, out, scale=scale, accumulate=accumulate)
                else:
                    whole = values.view(world, numel) if lost is not None else None
                    self._to_all(unit, out, rows, numel, scale, accumulate, whole)
            except NotFiniteError as error:
                slots = ((slot.fqn, full[slot.start : slot.end]) for slot in unit.layout.slots)
                name_not_finite(hops, error, "the gradient", slots, unit.device)
            if lost is not None:
                lost(values)

        return Ticket(keepalive=(full, values, sent, received), finish=finish)

    def _between_nodes(self, unit: FlatUnit, received: Tensor, numel: int, loss: Tensor | None) -> Tensor:
        """What the ranks of this node sent -> rows [nodes, bytes] of sums, one from each node.

        `loss` [nodes, numel]: this rank's errors of the chunks that it sums here; what coding the sums loses
        is added.
        """
        hops, intra, inter = self.hops, self._intra, self._inter
        nodes, width = hops.across.world, inter.wire_bytes(numel)
        rows = received.view(hops.node.world, nodes, intra.wire_bytes(numel))
        sent = hops.across.allocate(nodes * width, torch.uint8).view(nodes, width)
        sent[:, -4:] = 0
        coding = Coding(hops.across, inter, nodes * numel * unit.dtype.itemsize)
        with coding.encoding():
            if loss is not None or not _recode(intra, rows, numel, inter, sent):
                sums = torch.empty(nodes, numel, dtype=torch.float32, device=unit.device)
                for node in range(nodes):
                    sum_rows(intra, rows[:, node], sums[node])
                inter.encode(sums, sent)
                if loss is not None:
                    loss.add_(sums.sub_(_decoded(inter, sent, numel)))
            mark(inter, sent, numel)
        across = hops.across.allocate(nodes * width, torch.uint8)
        with coding.sending():
            ticket = hops.across.all_to_all(across, sent.view(-1), about=unit.about)
        ticket.wait()
        return across.view(nodes, width)

    def _to_all(
        self,
        unit: FlatUnit,
        out: Tensor,
        rows: Tensor,
        numel: int,
        scale: float,
        accumulate: bool,
        losses: Tensor | None,
    ) -> None:
        """Stage 0: this rank's chunk of the mean, coded once more, to every rank."""
        hops, codec = self.hops, self._last
        places, rank = hops.node.world, hops.across.rank * hops.node.world + hops.node.rank
        mean = torch.empty(1, numel, dtype=torch.float32, device=unit.device)
        sum_rows(codec, rows, mean[0], scale=scale)
        mine = hops.only.allocate(codec.wire_bytes(numel), torch.uint8)
        codec.encode(mean, mine.view(1, -1))
        if losses is not None:
            losses[rank].add_(mean[0].sub_(_decoded(codec, mine.view(1, -1), numel)[0]), alpha=1.0 / scale)
        whole = torch.empty(hops.across.world, places, numel, dtype=torch.float32, device=unit.device)
        spread(
            *(hops, codec, mine, numel),
            lambda part, j: read(codec, part, whole[:, j]),
            dtype=unit.dtype,
            about=unit.about,
        ).wait()
        put(out, whole.view(-1)[: out.numel()], scale=1.0, accumulate=accumulate)

    # -- checkpoints: only rounding by chance has a state ------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        states = [self._intra.state_dict(), self._inter.state_dict()]
        return {"codecs": states} if any(states) else {}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        return {}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        for codec, state in zip((self._intra, self._inter), values.get("codecs", ()), strict=False):
            codec.load_state_dict(state)


class OneHop(TwoHop):
    """The same by one all-to-all over all ranks: what `LoCo(codec)` is without a TwoHop of its own."""

    _two = False

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec, codec)


def _decoded(codec: Codec, rows: Tensor, numel: int) -> Tensor:
    """[rows, numel] fp32; NaN, as what has lost them, where nothing was finite."""
    values = torch.empty(rows.shape[0], numel, dtype=torch.float32, device=rows.device)
    read(codec, rows, values)
    return values


def _recode(intra: Codec, rows: Tensor, numel: int, inter: Codec, sent: Tensor) -> bool:
    """Rows [places, nodes, bytes] -> sums [nodes, bytes] in one pass; False where the codecs cannot."""
    if not isinstance(intra, BlockCodec) or not isinstance(inter, BlockCodec):
        return False
    return all(intra.recode(rows[:, node], numel, inter, sent[node : node + 1]) for node in range(len(sent)))
