"""From autograd's gradients to this rank's reduced shards: take, launch in one order, drain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_core.ground.flight import is_one_signature, signature
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec
from ds_core.state.grad_wire import GradWire
from ds_core.state.groups import DataGroups
from ds_core.state.route import GradientRoute
from ds_core.state.store import Away
from ds_core.state.unit import FlatUnit

IN_FLIGHT = 2  # reductions under way at once: enough to overlap, few enough to bound memory


@dataclass(slots=True)
class _Pending:
    """Gradients of one unit that have not been reduced yet."""

    bucket: Tensor | None
    filled: list[bool]
    taken: list[bool]  # slots with a gradient in this round


class GradReducer:
    """Collects gradients into flat buckets and reduces each bucket once in every round.

    A round is one outermost backward. [Note: one order for all ranks] Units are launched in one order that
    all ranks share, each at most once in a round: a unit whose gradients are complete waits for those before
    it, and at the end of the round the rest is launched with zeros in place of what never came. A rank
    where a parameter went unused therefore issues the same collectives as the others. Gradients that come
    after their unit's launch (a module run twice under re-entrant checkpointing) wait for the next round
    or for `drain`, where ranks first agree on what is left.

    With `whole_grads` gradients stay whole over micro batches, and only the last round before the optimizer
    step launches. Which round is the last is learned from the step before; a wrong guess costs bytes, never
    correctness, since reduction is linear. With `hold` gradients stay whole in any case.
    """

    def __init__(
        self,
        units: Sequence[FlatUnit],
        groups: DataGroups,
        *,
        sharded: bool,
        whole_grads: bool,
        codec: Codec | GradientRoute | None = None,
        overlap: bool = True,
        away: Away | None = None,
    ) -> None:
        self.units = list(units)
        self.order = list(reversed(range(len(self.units))))
        self.last: bool | None = None  # said by the engine; None: guess
        self.share = 1.0  # what this rank's gradients are multiplied by; at 0 they are as if they never came
        self.hold = False  # nothing is launched in rounds that begin while this is set
        self.in_round = False
        self.changed_elsewhere: Callable[[], object] = _unexpected  # another rank announced; raises
        self._control, self._replicas = groups.control, groups.replicas
        self._lanes = groups.lanes  # in which ranks must have issued the same before gradients are used
        self._sharded, self._whole_grads, self._overlap = sharded, whole_grads, overlap
        self._wire = GradWire(groups, codec)
        self._away = away  # takes reduced gradients to where they live, when that is not here
        self._pending = [_Pending(None, [False] * len(u.params), [False] * len(u.params)) for u in self.units]
        self._in_flight: list[tuple[FlatUnit, Ticket]] = []
        self._cursor = 0
        self._launching = False
        self._ends_step = False  # as far as one can tell, the step comes after this round
        self._rounds = 0
        self._expected_rounds: int | None = None
        self._unreduced = False
        self._seen = [[False] * len(u.params) for u in self.units]
        self._finished: list[int] = []  # completion order of the first round
        self._drained = True
        self._dropped: set[tuple[int, int]] = set()  # slots dropped one by one since the last backward

    # -- during backward -----------------------------------------------------------------------------------

    def open_round(self) -> None:
        """A backward has begun."""
        if self.in_round:
            return
        self.in_round = True
        self._drained = False
        self._dropped.clear()
        self._cursor = 0
        for unit_pending in self._pending:
            unit_pending.taken = [False] * len(unit_pending.filled)
        guess = self._expected_rounds == self._rounds + 1 if self.last is None else self.last
        whole = self._whole_grads or self._wire.whole_grads
        self._launching = not self.hold and (not whole or guess)
        self._ends_step = self._launching and guess

    def take(self, index: int, slot_index: int, grad: Tensor) -> bool:
        """Copy one gradient into its bucket. True when the unit has all of them for this round."""
        pending, unit = self._pending[index], self.units[index]
        if grad.is_sparse:
            name = unit.layout.slots[slot_index].fqn
            raise ValueError(f"{name} has a sparse gradient; build its module with sparse=False")
        if pending.bucket is None:
            pending.bucket = self._new_bucket(unit)
            pending.filled = [False] * len(pending.filled)
        slot = unit.layout.slots[slot_index]
        here = pending.bucket[slot.start : slot.end].view(slot.shape)
        if self.share == 0.0:
            grad = torch.zeros_like(grad)
        elif self.share != 1.0:
            grad = grad * self.share
        if pending.filled[slot_index]:
            here.add_(grad)
        else:
            here.copy_(grad)
            pending.filled[slot_index] = True
        self._seen[index][slot_index] |= self.share != 0.0
        again = pending.taken[slot_index]
        pending.taken[slot_index] = True
        if again or not all(pending.taken):
            return False
        self._finished.append(index)
        if self._launching and self._overlap:
            self._launch_ready()
        return True

    def close_round(self) -> None:
        """The backward has ended: launch what is left of this round."""
        if not self.in_round:
            return
        if self._launching:
            while self._cursor < len(self.order):
                self._launch(self.order[self._cursor])
                self._cursor += 1
        self._unreduced = not self._launching
        self._ends_step = False
        self._rounds += 1
        self.in_round = False

    def _new_bucket(self, unit: FlatUnit) -> Tensor:
        """In the wire's dtype if it leaves in this round, else in the dtype that gradients accumulate in."""
        dtype = unit.grad_dtype
        if self._launching and not self._unreduced:
            dtype = self._wire.dtype(unit)
        return self._wire.allocate(unit.layout.numel, dtype)

    def _launch_ready(self) -> None:
        while self._cursor < len(self.order) and all(self._pending[self.order[self._cursor]].taken):
            self._launch(self.order[self._cursor])
            self._cursor += 1

    def _launch(self, index: int) -> None:
        pending, unit = self._pending[index], self.units[index]
        bucket = self._complete(pending, unit)
        pending.bucket = None
        if not self._sharded:
            ticket = self._reduce_whole(unit, bucket)
        else:
            if self._away is not None:  # what is there is that of earlier rounds
                while any(flying is unit for flying, _ in self._in_flight):
                    self._in_flight.pop(0)[1].wait()
            if unit.gradient is not None and self._replicas.world > 1 and unit.is_mean:
                unit.gradient.mul_(1.0 / self._replicas.world)  # a share again, until the next drain
            unit.is_mean = False
            room = self._away.room(unit) if self._away is not None else None
            accumulate = unit.gradient is not None
            if room is None and unit.gradient is None:
                unit.gradient = torch.empty(
                    unit.layout.shard_numel, dtype=unit.grad_dtype, device=unit.device
                )
            out = unit.gradient if room is None else room
            assert out is not None
            ticket = self._wire.shard(unit, out, bucket, accumulate=accumulate)
            if room is not None and self._away is not None:
                keep = partial(self._away.keep, unit, room, final=self._ends_step)
                ticket = Ticket([ticket], keepalive=(room,), finish=keep)
        self._in_flight.append((unit, ticket))
        while len(self._in_flight) > (IN_FLIGHT if self._overlap else 0):
            self._in_flight.pop(0)[1].wait()

    def _complete(self, pending: _Pending, unit: FlatUnit) -> Tensor:
        """The bucket with zeros where nothing came and in the padding, in the wire's dtype."""
        bucket = pending.bucket
        if bucket is None:
            bucket = self._new_bucket(unit).zero_()
        else:
            at = 0
            slots = sorted(zip(unit.layout.slots, pending.filled, strict=True), key=lambda s: s[0].start)
            for slot, filled in slots:
                if at < slot.start:
                    bucket[at : slot.start].zero_()
                if not filled:
                    bucket[slot.start : slot.end].zero_()
                at = slot.end
            bucket[at:].zero_()
        return self._wire.ready(unit, bucket)

    def _reduce_whole(self, unit: FlatUnit, bucket: Tensor) -> Ticket:
        """Stage 0: every rank keeps the whole mean."""
        mean, ticket = self._wire.whole(unit, bucket)
        final = self._ends_step

        def keep() -> None:
            room = self._away.room(unit) if self._away is not None else None
            if room is not None and self._away is not None:
                total = room.copy_(mean) if unit.gradient is None else room.add_(mean)
                self._away.keep(unit, total, final=final)
            elif unit.gradient is not None:
                unit.gradient.add_(mean)
            else:
                unit.gradient = mean.to(unit.grad_dtype)

        return Ticket([ticket], keepalive=(bucket, mean), finish=keep)

    # -- at the step ---------------------------------------------------------------------------------------

    def drain(self) -> None:
        """All gradients final: launch what was kept back, agree on what else is left, wait for everything.

        Collective. Afterwards each unit's `gradient` and `has_grad` hold. Raises RuntimeError when a backward
        ended by an exception and its gradients were not dropped.
        """
        if self._drained:
            return
        if self.in_round:
            raise RuntimeError(
                "a backward did not finish (it raised?), so gradients are incomplete: call "
                "optimizer.zero_grad() and run the batch again"
            )
        if self._unreduced:
            for index in self.order:
                self._launch(index)
            self._unreduced = False
        leftover = self._agree()
        for index in self.order:
            if leftover[index]:
                self._launch(index)
        self.settle()
        self._sum_over_replicas()
        if self._expected_rounds is None:
            self._learn_order()
        self._expected_rounds, self._rounds = self._rounds, 0
        self._drained = True

    def _sum_over_replicas(self) -> None:
        """Between nodes gradients travel once in a step, as shards (Zhang et al., "MiCS", 2022)."""
        if self._replicas.world == 1:
            return
        tickets = []
        for index in self.order:
            unit = self.units[index]
            if unit.gradient is not None and not unit.is_mean:
                wire = unit.gradient.to(unit.device)  # itself, unless it lives elsewhere
                tickets.append((unit, wire, self._replicas.all_reduce(wire, about=unit.about)))
                unit.is_mean = True
        for unit, wire, ticket in tickets:
            ticket.wait()
            if unit.gradient is not None and wire is not unit.gradient:
                unit.gradient.copy_(wire)
            elif unit.gradient is not None:
                torch.autograd.graph.increment_version(unit.gradient)  # collectives write behind its back

    def _agree(self) -> list[bool]:
        """Which slots got a gradient on any rank, and which units still hold some on any rank."""
        flags = [float(seen) for slots in self._seen for seen in slots]
        flags += [float(pending.bucket is not None) for pending in self._pending]
        agreed = self._vote([*flags, 0.0])
        if agreed.pop():
            self.changed_elsewhere()
        at = 0
        for unit in self.units:
            count = len(unit.params)
            unit.has_grad = [new or old for new, old in zip(agreed[at:], unit.has_grad, strict=False)]
            at += count
        return agreed[at:]

    def announce(self) -> None:
        """This rank's model changed. Ranks that did not notice are at a `drain`, sooner or later, and learn
        of it in the vote that they take there; ranks that did meet here. Collective with either.
        """
        self._vote([*[0.0] * (sum(map(len, self._seen)) + len(self._pending)), 1.0])

    def _vote(self, flags: list[float]) -> list[bool]:
        """Each flag as it is on any rank; the last says that a model changed.

        Raises DesyncError when ranks did not issue the same collectives so far.
        """
        votes = torch.tensor(flags + signature(self._lanes), dtype=torch.float32)
        about = "what gradients ranks have, and whether a model changed"
        self._control.all_reduce(votes, op="max", about=about).wait()
        found: list[float] = votes.tolist()
        if not found[len(flags) - 1] and not is_one_signature(found[len(flags) :]):
            self._lanes[0].disagree()
        return [vote > 0 for vote in found[: len(flags)]]

    def _learn_order(self) -> None:
        """From now on launch in the order in which rank 0's units were complete in the first round."""
        known = list(dict.fromkeys(self._finished))
        rest = [index for index in self.order if index not in set(known)]
        order = torch.tensor(known + rest, dtype=torch.int64)
        self._control.broadcast(order, about="the order of reductions").wait()
        self.order = order.tolist()

    def clear(self) -> None:
        """Forget every gradient, reduced or not. Collectives under way are waited for first."""
        self.settle()
        for unit, pending, seen in zip(self.units, self._pending, self._seen, strict=True):
            unit.drop_grad()
            pending.bucket = None
            seen[:] = [False] * len(seen)
        self.in_round = self._unreduced = False
        self._rounds = 0
        self._drained = True
        self._finished.clear()
        self._dropped.clear()

    def clear_slots(self, chosen: Mapping[FlatUnit, Sequence[int]]) -> None:
        """Forget the gradients of some slots, and everything once nothing is left that could be kept.

        Every rank drops the same slots, whatever it holds of them, so all ranks come to the same end.
        """
        index_of = {unit: index for index, unit in enumerate(self.units)}
        self._dropped |= {(index_of[unit], slot) for unit, slots in chosen.items() for slot in slots}
        # What a backward that raised has left behind is of no use to anyone.
        if self.in_round or len(self._dropped) == sum(len(unit.params) for unit in self.units):
            self.clear()
            return
        for _, ticket in self._in_flight:
            ticket.wait()
        self._in_flight.clear()
        if self._away is not None:
            self._away.landed()  # a gradient on its way must not arrive after it was zeroed
        for unit, slots in chosen.items():
            index = index_of[unit]
            for slot in slots:
                unit.drop_grad_of(slot)
                self._pending[index].filled[slot] = self._seen[index][slot] = False

    def settle(self) -> None:
        """Every reduction under way has arrived, and what leaves the device has left."""
        for _, ticket in self._in_flight:
            ticket.wait()
        self._in_flight.clear()
        if self._away is not None:
            self._away.landed()

    def live(self) -> list[Tensor]:
        """What holds gradients between micro batches: buckets that are not reduced yet, and shards."""
        found = [pending.bucket for pending in self._pending] + [unit.gradient for unit in self.units]
        return [tensor for tensor in found if tensor is not None]

    def forget_taken(self) -> None:
        """The step has used the gradients: the next backward starts a new count of what was seen."""
        for seen in self._seen:
            seen[:] = [False] * len(seen)


def _unexpected() -> None:
    raise RuntimeError("another rank changed its model, and this one cannot")
