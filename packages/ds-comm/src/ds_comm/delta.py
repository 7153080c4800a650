"""What changed of the parameters, quantised: for copies that stay whole, where the rest is known already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_comm.error_feedback import zero_padding
from ds_comm.quantized_weights import QuantizedWeights
from ds_core.ground.ticket import Ticket
from ds_core.state.owner import FlatOwner
from ds_core.state.saved import check_shapes, flat_shards
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit


class Delta(QuantizedWeights):
    """A ParamRoute for stages 1 and 2: whole += decode(encode(shard - whole)), on every rank alike.

    A step changes parameters by little, so coding the change loses much less than coding the values. What
    rounding loses stays in the difference and is sent with the next one: a copy lags behind its master by at
    most the codec's bound of the last difference, and rounding errors do not add up.

    The first gather is exact, as is one after a checkpoint of a run without this route. Checkpoints hold
    the copies as `published/<parameter>`, cut as the parameters are, so that a resumed run lags as the saved
    one did, at any world. Memory: each rank's own part once more, in the parameters' dtype.
    Two hops, `hierarchical` and `node_size` are those of QuantizedWeights.
    """

    def connect(self, owner: FlatOwner) -> None:
        """Collective. Raises ValueError as QuantizedWeights, and where copies are let go (stage 3)."""
        cut = [u for u in owner.units if u.trainable and u.dtype.is_floating_point and not u.keep_whole]
        if cut:
            raise ValueError(
                f"Delta adds to whole copies, and {cut[0].about} lets its copy go: use stage 1 or 2, or "
                "QuantizedWeights at stage 3"
            )
        super().connect(owner)
        self._owner = owner
        self._units = {unit.key: unit for unit in owner.trainable if unit.dtype.is_floating_point}
        self._loading: dict[str, Tensor] = {}
        # What all other ranks hold of this rank's part: whole copies are the same on all of them here.
        self._sent = {key: unit.whole[unit.span].clone() for key, unit in self._units.items()}

    def explain(self) -> str:
        return f"differences, {super().explain()}"

    def gather(self, unit: FlatUnit, shard: Tensor) -> Ticket:
        if self.hops.world == 1 or unit.key not in self._units:
            return self._plain.all_gather(unit.whole, shard, about=unit.about)
        sent = self._sent.get(unit.key)
        if sent is None:
            self._sent[unit.key] = shard.clone()
            return self._plain.all_gather(unit.whole, shard, about=unit.about)
        own = unit.whole[unit.span].copy_(sent)
        ticket = self._spread(unit, shard.float().sub_(own), shard, shard.numel(), accumulate=True)

        def finish() -> None:
            ticket.wait()
            zero_padding(unit, unit.whole)
            sent.copy_(own)

        return Ticket(finish=finish)

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """What is published of every parameter, cut as it is."""
        state = super().state_dict()
        for key, sent in self._sent.items():
            unit = self._units[key]
            shards = flat_shards(unit, sent, self._owner.written_part(unit))
            state |= {f"published/{fqn}": shard for fqn, shard in shards.items()}
        return state

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Raises ValueError naming every parameter that is missing, unknown or of another shape."""
        self._sent = {}  # loading parameters publishes them: exactly, whatever comes of it
        self._loading = {}
        prefix = "published/"
        found = {name.removeprefix(prefix): info for name, info in saved.items() if name.startswith(prefix)}
        if not found:
            return {}
        mine = {slot.fqn: slot.shape for unit in self._units.values() for slot in unit.layout.slots}
        check_shapes({fqn: shape for fqn, shape in mine.items() if shape.numel()}, _shapes(found))
        targets: dict[str, Tensor | FlatShard] = {}
        for key, unit in self._units.items():
            room = torch.zeros(unit.layout.shard_numel, dtype=unit.dtype, device=unit.device)
            self._loading[key] = room
            targets |= {f"{prefix}{fqn}": shard for fqn, shard in flat_shards(unit, room).items()}
        return targets

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Every copy is what it was when the checkpoint was taken. Collective."""
        super().load_state_dict(values)
        for key, sent in self._loading.items():
            unit = self._units[key]
            if unit.ticket is not None:
                unit.arrive(unit.ticket)
            self._plain.all_gather(unit.whole, sent, about=unit.about).wait()
            torch.autograd.graph.increment_version(unit.params)
            unit.note_versions()
        self._sent = self._loading or self._sent
        self._loading = {}


def _shapes(found: Mapping[str, SavedTensor]) -> dict[str, tuple[int, ...]]:
    return {fqn: tuple(info.shape) for fqn, info in found.items()}
