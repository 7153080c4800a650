"""Momenta in place of gradients, one bit each: two hops, and what either rounding lost is sent later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_comm.agreement import refuse_disagreement
from ds_comm.compressing import Compressing, GroupRuns, Mode
from ds_comm.error_feedback import ErrorRows
from ds_comm.masks import Masks
from ds_comm.preconditioner import Exponents
from ds_comm.server_errors import ServerErrors
from ds_comm.signs_wire import MomentumWire, SignRows, plan_chunks
from ds_comm.spoilt import SpoiltMomenta
from ds_core.ground.listener import Coding
from ds_core.ground.ticket import Ticket
from ds_core.state.layout import BucketLayout
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import optimizers_of

_COUNTERS = "counters"


class MomentumRoute:
    """The GradientRoute of the 1-bit optimizers.

    In mode SIGNS every rank forms beta1 * m + (1 - beta1) * its own gradient of the whole step, adds its
    error, and keeps signs and scales; each rank sums one chunk over all ranks, adds the chunk's error, keeps
    signs and scales again and hands them to everybody: what the optimizer sees as gradient is the new m.
    Collective: one all-to-all and one all-gather per unit and step, in the order in which units are reduced.
    Bytes a rank sends: 2 (world - 1) / world * (numel / 8 + 4 for each block), where an all-reduce of fp32
    takes 2 (world - 1) / world * 4 numel.
    Memory: an error [numel] fp32 and one [numel / world], from the first such step on; at stages 1 and 2 all
    of m as it was on the wire, numel / 8 bytes and scales.
    A gradient that is not finite is not sent: NaN scales tell every rank, and all raise NonFiniteError in
    the same step. Errors of that unit are zero from then on; its m and every weight are as they were.
    """

    def __init__(self, optimizer: Compressing, wire: MomentumWire) -> None:
        self.owner: FlatOwner | None = None
        self.spoilt = SpoiltMomenta()
        self._optimizer, self._wire = optimizer, wire
        self._masks = Masks(wire.masks)
        self._errors: ErrorRows | None = None  # nothing is lost, and nothing allocated, before signs travel
        self._server: ServerErrors | None = None
        self._layouts: dict[str, BucketLayout] = {}  # by the unit's key
        self._received: dict[str, list[Tensor]] = {}  # m, as it came: the sum of these
        self._exponents: dict[str, Exponents | None] = {}  # of the variance that m came in units of
        self._flying: set[str] = set()
        self._groups = GroupRuns(optimizer)

    # -- joining -------------------------------------------------------------------------------------------

    def connect(self, owner: FlatOwner) -> None:
        """Raises ValueError for an owner whose gradients cannot travel so. Collective."""
        _refuse(owner)
        self._optimizer.refuse(owner)
        self._masks.connect(owner.trainable, owner.comm.world)
        wire = self._wire
        settings = {
            "block": wire.block,
            "norm": wire.norm,
            "preconditioned": wire.preconditioned,
            "masks": self._masks.digests(),
        }
        what = type(self._optimizer).__name__
        refuse_disagreement(owner.control, {**self._optimizer.settings(), **settings}, what=what)
        self.owner = owner
        self._layouts = {unit.key: plan_chunks(unit.layout, owner.comm.world) for unit in owner.trainable}
        self._received.clear()
        self._exponents.clear()
        self._flying.clear()
        if self._errors is not None:  # units are cut anew
            self._start()

    def need(self) -> FlatOwner:
        """The owner. Raises RuntimeError where gradients did not come along here."""
        name = type(self._optimizer).__name__
        if self.owner is None:
            raise RuntimeError(
                f"{name} was never joined to its model's gradients: pass it through ds_zero.shard(model, "
                "optimizer, stage=...), or give reduce=optimizer.route to whoever owns the model"
            )
        mine: object = self._optimizer
        others = [one for one in optimizers_of(self.owner) if one.optimizer is not mine]
        if others:
            raise RuntimeError(
                f"{type(others[0].optimizer).__name__} steps on the same model as {name}, whose route "
                "carries momenta and no gradients for others: give all parameters to one of them"
            )
        return self.owner

    def _start(self) -> tuple[ErrorRows, ServerErrors]:
        owner = self.owner
        assert owner is not None
        self._errors = self._errors or ErrorRows()
        self._server = self._server or ServerErrors(owner.comm)
        self._errors.connect(owner.trainable, owner.everyone, owner.changes)
        self._server.connect(owner.trainable)
        return self._errors, self._server

    def pieces(self, unit: FlatUnit) -> Sequence[Piece]:
        """What of the unit this rank updates."""
        return self._groups.pieces(unit)

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def whole_grads(self) -> bool:
        """Momenta are formed once in a step, from the gradient of all its micro batches."""
        return self._optimizer.mode is not Mode.PLAIN

    @torch.no_grad()
    def reduce(
        self, unit: FlatUnit, out: Tensor, full: Tensor, *, scale: float, accumulate: bool
    ) -> Ticket | None:
        """`scale` is 1 / world: what travels is a mean already. A second call in a step, for gradients that
        came late, adds their share of the same momentum.
        """
        owner = self.need()
        mode = self._optimizer.mode
        if mode is Mode.PLAIN:
            self._received.pop(unit.key, None)  # the variance changes, and the momentum
            self._exponents.pop(unit.key, None)
            return None
        again = accumulate
        if not owner.sharded:  # there the reducer adds
            again = unit.gradient is not None or unit.key in self._flying
        errors, server = (self._errors, self._server) if self._errors and self._server else self._start()
        owner.changes.open()
        value = self._form(unit, full, again=again)
        if mode is Mode.LOCAL:
            if self.spoilt.note(unit, value):
                out.zero_()
            else:
                self._keep(unit, out, value, again=again)
            return Ticket()
        self._optimizer.before_sending_(unit, value, again=again)
        powers = self._powers(unit)
        if powers is not None:
            powers.shrink_(value)
        comm, rows = owner.comm, SignRows.of(self._layouts[unit.key].shard_numel, self._wire)
        sent = comm.allocate(comm.world * rows.width, torch.uint8)
        received = comm.allocate(comm.world * rows.width, torch.uint8)
        coding = Coding(comm, rows, comm.world * rows.each * unit.dtype.itemsize)
        with coding.encoding():
            self._pack(unit, rows, value, errors, sent)
        with coding.sending():
            ticket = comm.all_to_all(received, sent, about=unit.about)
        self._flying.add(unit.key)

        @torch.no_grad()
        def second_hop() -> None:
            self._flying.discard(unit.key)
            owner.changes.open()
            error, mine = server.of(unit), comm.allocate(rows.width, torch.uint8)
            mean = torch.empty(rows.each, device=unit.device)
            with coding.decoding():
                rows.sum(received, mean, factor=1.0 / comm.world)
            begin = comm.rank * rows.each
            with coding.encoding():
                if powers is not None:
                    powers.divide_(error, begin)
                rows.pack_(mean, error, mine)
                if powers is not None:
                    powers.multiply_(error, begin)
            server.clean(unit)
            self._masks.apply_(unit, error, begin)
            everybody = comm.allocate(comm.world * rows.width, torch.uint8)
            with coding.sending():
                spread = comm.all_gather(everybody, mine, about=unit.about)
            spread.wait()
            if not bool(torch.isfinite(rows.scales(everybody)).all()):
                errors.of(unit).zero_()
                error.zero_()
                raise self.spoilt.error(owner, unit, value)
            self._arrive(unit, out, everybody, rows, again=again)

        return Ticket([ticket], keepalive=(value, sent, received), finish=second_hop)

    def _form(self, unit: FlatUnit, full: Tensor, *, again: bool) -> Tensor:
        """beta1 * m + (1 - beta1) * gradient, [chunks] fp32, zero where there is no parameter."""
        layout = self._layouts[unit.key]
        if full.dtype == torch.float32 and full.numel() == layout.numel:
            value = full
        else:
            value = torch.zeros(layout.numel, device=unit.device)
            value[: full.numel()].copy_(full)
        momentum = None if again else self._whole(unit)
        at = 0
        for start, end, group in self._groups.runs(unit):
            value[at:start].zero_()
            part, beta = value[start:end], float(group["betas"][0])
            if group["weight_decay"] and not group.get("decoupled_weight_decay", True) and not again:
                part.add_(unit.whole[start:end].float().mul_(group["weight_decay"]))
            part.mul_(1.0 - beta)
            if momentum is not None:
                part.add_(momentum[start:end].mul_(beta))
            at = end
        value[at:].zero_()
        self._masks.apply_(unit, value, 0)
        return value

    def _whole(self, unit: FlatUnit) -> Tensor:
        """m [chunks] fp32, to be overwritten: from what the last steps brought, or from all ranks' shards."""
        owner, layout = self.need(), self._layouts[unit.key]
        whole = torch.zeros(layout.numel, device=unit.device)
        came = self._received.get(unit.key)
        if came is not None:
            rows = SignRows.of(layout.shard_numel, self._wire)
            self._decode(unit, rows, came[0], whole, 0)
            for more in came[1:]:
                whole.add_(self._decode(unit, rows, more, torch.empty_like(whole), 0))
            return whole
        numel = unit.layout.shard_numel
        shard = torch.zeros(numel, device=unit.device) if owner.sharded else whole
        for piece in self._groups.pieces(unit):
            shard[slice(*piece.overlap.local)].copy_(self._optimizer.momentum(piece).view(-1))
        if owner.sharded:
            owner.comm.all_gather(whole, shard, about=f"momentum of {unit.about}").wait()
        return whole

    def _powers(self, unit: FlatUnit) -> Exponents | None:
        """What momenta are divided by on the wire. Collective at stages 1 and 2 if the variance changed."""
        if unit.key not in self._exponents:
            owner, found = self.need(), None
            if self._wire.preconditioned and self._optimizer.preconditions:
                comm, numel = owner.comm if owner.sharded else None, self._layouts[unit.key].numel
                parts = [(slice(*p.overlap.local), self._optimizer.variance(p)) for p in self.pieces(unit)]
                found = Exponents.gather(parts, numel, comm, unit.about)
            self._exponents[unit.key] = found
        return self._exponents[unit.key]

    def _pack(self, unit: FlatUnit, rows: SignRows, value: Tensor, errors: ErrorRows, wire: Tensor) -> None:
        error, powers = errors.of(unit), self._powers(unit)
        if powers is not None:
            powers.divide_(error)
        if error.numel() == value.numel():
            rows.pack_(value, error, wire)
        else:  # nothing is cut, and chunks are not of one size
            padded = torch.zeros_like(value)
            padded[: error.numel()].copy_(error)
            rows.pack_(value, padded, wire)
            error.copy_(padded[: error.numel()])
        if powers is not None:
            powers.multiply_(error)
        errors.clean(unit)
        self._masks.apply_(unit, error, 0)

    def _decode(self, unit: FlatUnit, rows: SignRows, wire: Tensor, out: Tensor, begin: int) -> Tensor:
        """What came, as momentum: out [rows * each] <- wire, of the unit's elements from `begin` on."""
        rows.unpack(wire, out)
        powers = self._powers(unit)
        if powers is not None:
            powers.multiply_(out, begin)
        self._optimizer.after_receiving_(unit, out, begin)
        self._masks.apply_(unit, out, begin)
        return out

    def _arrive(self, unit: FlatUnit, out: Tensor, wire: Tensor, rows: SignRows, *, again: bool) -> None:
        owner = self.need()
        if not owner.sharded:
            whole = torch.empty(len(rows.scales(wire)) * rows.each, device=unit.device)
            self._keep(unit, out, self._decode(unit, rows, wire, whole, 0), again=again)
            return
        before = self._received.get(unit.key, []) if again else []
        if (
            again and not before
        ):  # m is nowhere but in the shards, and no longer what came: gathered when needed
            self._received.pop(unit.key, None)
        else:
            self._received[unit.key] = [*before, wire]
        at = owner.comm.rank
        row = wire[at * rows.width : (at + 1) * rows.width]
        mine = torch.empty(rows.each, device=unit.device)
        self._keep(unit, out, self._decode(unit, rows, row, mine, at * rows.each), again=again)

    def _keep(self, unit: FlatUnit, out: Tensor, momentum: Tensor, *, again: bool) -> None:
        """The optimizer's state, and what it will see as gradient; at stage 0 the reducer adds to that."""
        owner = self.need()
        momentum = momentum[: out.numel()]
        if again and owner.sharded:
            out.add_(momentum)
        else:
            out.copy_(momentum)
        for piece in self._groups.pieces(unit):
            self._optimizer.receive_(piece, momentum[slice(*piece.overlap.local)], again=again)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """The counters; once signs travel `error/<parameter>` [world, *shape] and `server/<parameter>`."""
        owner = self.need()
        owner.reducer.settle()  # a step whose momenta are on their way is in it as a whole
        state: dict[str, Tensor | FlatShard | Json] = {_COUNTERS: self._optimizer.counters()}
        if self._errors is not None and self._server is not None:
            state |= self._errors.state_dict() | self._server.state_dict()
        return state

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Nothing from a run that has sent no signs yet, or of another optimizer."""
        self._received.clear()
        self._exponents.clear()
        self._errors = self._server = None
        if not saved:
            return {}
        errors, server = self._start()
        found = errors.load_targets(saved)
        return found | server.load_targets(saved)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Another optimizer's checkpoint begins with a warm-up. Collective at another world size."""
        self._optimizer.load_counters(values.get(_COUNTERS))
        if self._errors is not None:
            self._errors.load_state_dict(values)


def _refuse(owner: FlatOwner) -> None:
    """Raises ValueError, with the reason and what to change."""
    if owner.stage > 2:
        raise ValueError(
            "compressed momenta need every rank to hold whole parameters; stage 3 cuts them, and its gathers "
            "are most of what travels: use stage 0, 1 or 2"
        )
    if owner.replicas.world > 1:
        raise ValueError(
            f"compressed momenta are averaged over all ranks at once, and here {owner.replicas.world} groups "
            "hold copies (dp_replicate > 1), which would sum momenta as if they were gradients: put all "
            "ranks into dp_shard, or use stage 0"
        )
    if owner.store.away is not None:
        raise ValueError(
            "compressed momenta are written when they arrive, into states that this store keeps elsewhere: "
            "leave the store out"
        )
    for unit in owner.trainable:
        if unit.dtype == torch.float16:
            raise ValueError(
                f"{unit.layout.slots[0].fqn} is fp16, whose loss scale changes what a momentum is a mean of: "
                "use dtype=torch.bfloat16, or fp32"
            )
        if unit.master_dtype != torch.float32:
            raise ValueError(
                f"{unit.layout.slots[0].fqn} has {unit.master_dtype} masters, and momenta need fp32 ones: "
                "build the model in fp32, and give dtype=torch.bfloat16 to whoever shards it"
            )
