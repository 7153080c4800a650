"""One flat unit: a buffer whose views are the modules' parameters, and this rank's shard of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor, nn

from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Communicator
from ds_core.state.absent import mark_absent, mark_present
from ds_core.state.layout import BucketLayout, Cut, plan_layout
from ds_core.state.precision import Precision
from ds_core.state.store import Lease, Store
from ds_core.state.units import UnitPlan


class LostWriteError(RuntimeError):
    """A parameter was written where the write does not reach its master."""

    def __init__(self, fqn: str) -> None:
        super().__init__(
            f"parameter {fqn} was written in place, but its master copy is sharded and never saw it, so the "
            f"write would be lost: write inside `with ds_zero.gather(param, write=0):`"
        )


class Whole(enum.Enum):
    """What the whole copy of a unit holds."""

    ABSENT = "no bytes: only the shard exists"
    STALE = "bytes, but older than the shards"
    COMING = "a gather is in flight"
    READY = "the current values"


class FlatUnit:
    """Parameters that live in one buffer.

    `whole` [numel] is what modules see; `local` [shard_numel] this rank's part of it in the same dtype;
    `master` [shard_numel] what the optimizer updates. Where nothing is lost they are the same memory:
    `local` is a view of a `whole` that stays, and `master` is `local` unless parameters are low precision.

    [Note: buffers are let go by resize] Letting the whole copy go resizes its storage to nothing, so that
    tensors which autograd saved (the parameter's transposes and slices) come back to life when the storage
    is filled again. The parameters themselves meanwhile show one NaN, expanded to their shape: reading
    gives NaN and writing raises, where freed memory would crash.
    """

    def __init__(
        self,
        plan: UnitPlan,
        *,
        world: int,
        rank: int,
        device: torch.device,
        precision: Precision,
        cut: Cut = "flat",
        keep_whole: bool = True,
        master_apart: bool = False,
    ) -> None:
        self.plan = plan
        self.key = plan.key
        self.about = plan.about
        self.rank = rank
        self.trainable = plan.trainable
        self.keep_whole = keep_whole
        self.params: list[nn.Parameter] = [param for _, param in plan.params]
        self.cut = cut
        self.layout: BucketLayout = plan_layout(((n, p.shape) for n, p in plan.params), world, cut=cut)
        begin = rank * self.layout.shard_numel
        self.span = slice(begin, begin + self.layout.shard_numel)  # this rank's part of the whole buffer
        self.dtype = plan.dtype
        self.grad_dtype = precision.of_grads(plan)
        self.master_dtype = precision.of_master(plan)
        # A whole copy that stays cannot hold a master that lives elsewhere, or that a lossy gather must not
        # overwrite with what was on the wire.
        self.separate_master = self.master_dtype != self.dtype or (master_apart and keep_whole)
        self.device = device
        self.state = Whole.ABSENT
        self.ticket: Ticket | None = None
        self.gradient: Tensor | None = None
        self.edition = 0  # counts changes of `local`
        self.is_mean = False  # `gradient` is the mean over replicas too, not this one's share of it
        self.bring: Callable[[FlatUnit], bool] = _stays_away  # for a use that no hook announced
        me = ref(self)
        self._bring = lambda: (unit := me()) is not None and unit.bring(unit)
        self.pinned = 0  # how many `gather` contexts want it whole
        self.gone = False  # the parameters show no values
        self._versions: list[int] = []  # of `params`, when they last equalled the masters
        self.has_grad: list[bool] = [False] * len(self.params)  # per slot, on any rank; true after drain
        self.whole: Tensor
        self.local: Tensor
        self._store: Store | None = None
        filler = float("nan") if self.dtype.is_floating_point else 0
        self._poison = torch.full((), filler, dtype=self.dtype, device=device)

    # -- construction --------------------------------------------------------------------------------------

    def adopt(self, flat: Tensor, store: Store) -> None:
        """Take `flat` [numel] as the unit's values: cut master and shard, make the parameters views."""
        self._store = store
        self.whole = flat if flat.dtype == self.dtype else flat.to(self.dtype)
        part = self.whole[self.span]
        self.local = _give(self, store, part if self.keep_whole else part.clone(), flat[self.span])
        self.state = Whole.READY
        self.point_at_whole()
        self.note_versions()
        if not self.keep_whole:
            self.let_go()

    @property
    def shard_key(self) -> str | None:
        """What the store knows `local` as; None where it is part of a whole copy that stays."""
        if self.keep_whole:
            return None
        return f"{self.key}/{'master' if self.trainable and not self.separate_master else 'param'}"

    # -- cut anew ---------------------------------------------------------------------------------------

    def begin(self, store: Store, fill: Callable[[Tensor], None] | None = None) -> None:
        """Memory for values that come parameter by parameter (see replan.py); padding is zero.

        `fill` is given this rank's part [shard_numel] in the master's dtype before the store takes it.
        """
        self._store = store
        values = torch.zeros(self.layout.shard_numel, dtype=self.master_dtype, device=self.device)
        if fill is not None:
            fill(values)
        if self.keep_whole:
            self.whole = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
            local = self.whole[self.span].copy_(values)
        else:
            self.whole = torch.empty(self.layout.numel, dtype=self.dtype, device=self.device)
            self.whole.untyped_storage().resize_(0)
            local = values.to(self.dtype)
        self.local = _give(self, store, local, values)

    def rewritten(self) -> list[int]:
        """Slots whose parameter shows other memory than the unit's: somebody assigned to its `.data`."""
        if self.device.type == "meta":
            return []
        base = (self._poison if self.gone else self.whole).data_ptr()
        step = 0 if self.gone else self.whole.element_size()
        with torch._C.DisableTorchFunctionSubclass():
            return [
                index
                for index, (slot, param) in enumerate(zip(self.layout.slots, self.params, strict=True))
                if param.data_ptr() != base + step * slot.start and slot.end > slot.start
            ]

    def dissolve(self) -> None:
        """Give everything back. The parameters are plain ones without values, to be put elsewhere.

        A graph that saved them while they were cut raises in its backward, as for any write since.
        """
        if self.ticket is not None:
            self.ticket.wait()
            self.ticket = None
        taken = set(self.rewritten())
        for index, (slot, param) in enumerate(zip(self.layout.slots, self.params, strict=True)):
            mark_present(param)
            if not self.gone and not self.keep_whole:
                torch.autograd.graph.increment_version(param)
            if index not in taken:
                param.data = self._poison.expand(slot.shape)
        if not self.keep_whole:
            self.whole.untyped_storage().resize_(0)
        if self._store is not None:
            for key in {f"{self.key}/master" if self.trainable else None, self.shard_key} - {None}:
                self._store.drop(str(key))
        self.drop_grad()
        self.state = Whole.ABSENT
        self.params, self.layout = [], replace(self.layout, slots=())
        self.local = self.whole = self._poison

    # -- the whole copy ------------------------------------------------------------------------------------

    def point_at_whole(self) -> None:
        """The parameters are views of the whole copy."""
        self._shift_versions(gone=False)
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            mark_present(param)
            param.data = self.whole[slot.start : slot.end].view(slot.shape)

    def make_room(self) -> Tensor:
        """The whole buffer with bytes behind it, uninitialised if they were gone."""
        nbytes = self.whole.numel() * self.whole.element_size()
        if self.whole.untyped_storage().nbytes() != nbytes:
            self.whole.untyped_storage().resize_(nbytes)
        return self.whole

    def arrive(self, ticket: Ticket | None = None) -> None:
        """The whole copy is current; parameters show it."""
        if ticket is not None:
            self.state = Whole.STALE  # should it fail: whoever needs it next brings it again
            self.ticket = None
            ticket.wait()
        self.ticket = None
        self.state = Whole.READY
        if not self.keep_whole:
            self.point_at_whole()
            self.note_versions()

    def let_go(self) -> None:
        """Free the whole copy. See [Note: buffers are let go by resize]."""
        ticket, self.ticket = self.ticket, None
        failed: OSError | None = None
        try:
            if ticket is not None:
                ticket.wait()
        except OSError as error:  # of a disk: it goes all the same
            failed = error
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            mark_present(param)
            param.data = self._poison.expand(slot.shape)
        written = None if self.gone else self.lost_write()
        self._shift_versions(gone=True)
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            mark_absent(param, slot.fqn, self._bring)
        self.whole.untyped_storage().resize_(0)
        self.state = Whole.ABSENT
        if failed is not None:
            raise failed
        if written is not None:
            raise LostWriteError(written)

    def _shift_versions(self, *, gone: bool) -> None:
        """While its values are gone a parameter counts as written, so autograd will not use what it saved.

        Only a backward that runs while the unit is away sees it: the count goes back when the unit arrives.
        """
        if gone != self.gone:
            step = 1 if gone else -1
            torch._C._autograd._unsafe_set_version_counter(
                tuple(self.params), tuple(param._version + step for param in self.params)
            )
            self.gone = gone

    # -- writes --------------------------------------------------------------------------------------------

    def note_versions(self) -> None:
        """From here on in-place writes to the parameters are noticed."""
        self._versions = [param._version for param in self.params]

    def lost_write(self) -> str | None:
        """The name of a parameter that was written in place although its master, elsewhere, never saw it."""
        own_master = not self.separate_master and self.layout.world == 1
        if self.keep_whole and (own_master or not self.trainable):
            return None  # the parameter is its own master
        for slot, param, noted in zip(self.layout.slots, self.params, self._versions, strict=True):
            if param._version != noted:
                self.note_versions()  # said once
                return slot.fqn
        return None

    # -- what the optimizer and checkpoints see ------------------------------------------------------------

    def grad(self) -> Tensor | None:
        """[shard_numel] in the gradient dtype; final once the owner has drained."""
        return self.gradient

    def drop_grad_of(self, index: int) -> None:
        """Forget one slot's gradient; zero from here on."""
        self.has_grad[index] = False
        overlap = self.layout.overlap(self.rank, index)
        if self.gradient is not None and overlap is not None:
            self.gradient[slice(*overlap.local)].zero_()

    def drop_grad(self) -> None:
        self.gradient = None
        self.has_grad = [False] * len(self.params)

    def master(self) -> Lease:
        """[shard_numel] in the master dtype. Raises ValueError for a frozen unit."""
        if not self.trainable or self._store is None:
            raise ValueError(f"unit {self.key!r} is frozen: it has no master copy")
        return self._store.lease(f"{self.key}/master", self.device)

    def values(self) -> Tensor:
        """The authoritative values of this rank's part: the master, or the shard of a frozen unit."""
        return (
            self.local
            if self._store is None or not self.trainable
            else self._store.home(f"{self.key}/master")
        )

    def refresh_local(self) -> None:
        """Master -> shard in the parameters' dtype (nothing to copy where they are the same memory)."""
        self.edition += 1
        if self.trainable and self.separate_master:
            with self.master() as lease:
                self.local.copy_(lease.tensor)
            away = None if self._store is None else self._store.away
            let_go = None if away is None or self.shard_key is None else away.paged(self.shard_key)
            if let_go is not None:
                let_go()

    def absorb_whole(self) -> None:
        """The parameters were written: whole -> shard and master."""
        self.edition += 1
        part = self.whole[self.span]
        if self.local.data_ptr() != part.data_ptr():
            self.local.copy_(part)
        if self.trainable and self.separate_master:
            with self.master() as lease:
                lease.tensor.copy_(part)
                lease.dirty = True
        self.note_versions()


def _give(unit: FlatUnit, store: Store, local: Tensor, values: Tensor) -> Tensor:
    """Give shard and master to the store, one tensor where nothing is lost; returns the shard's home."""
    if store.away is not None:
        store.away.expect(unit)
    if unit.trainable:
        apart = unit.separate_master
        home = store.create(f"{unit.key}/master", values.to(unit.master_dtype, copy=True) if apart else local)
        if not apart:
            return home
    return local if unit.keep_whole else store.create(f"{unit.key}/param", local)


def refuse_lost_writes(units: Sequence[FlatUnit]) -> None:
    """Before a step: LostWriteError for an in-place write that no master saw, naming the parameter."""
    for unit in units:
        if unit.keep_whole and (fqn := unit.lost_write()) is not None:
            raise LostWriteError(fqn)


def gather_shards(comm: Communicator, unit: FlatUnit, shard: Tensor) -> Tensor:
    """All ranks' shards [shard_numel] of a unit in a row: [numel]. Collective where units are cut."""
    shard = shard.to(unit.device)  # from wherever it lives
    if unit.layout.world == 1:
        return shard
    flat = torch.empty(unit.layout.numel, dtype=shard.dtype, device=shard.device)
    comm.all_gather(flat, shard, about=unit.about).wait()
    return flat


def _stays_away(unit: FlatUnit) -> bool:
    return False
