"""One flat unit: a buffer whose views are the modules' parameters, and this rank's shard of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_core.ground.ticket import Ticket
from ds_core.state.absent import mark_absent, mark_present
from ds_core.state.layout import BucketLayout, Cut, plan_layout
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


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a run. `param` None leaves every parameter as it is, without masters."""

    param: torch.dtype | None = None
    grad: torch.dtype | None = None

    def of_params(self, plan: UnitPlan) -> torch.dtype:
        return self.param if self.param is not None and plan.dtype.is_floating_point else plan.dtype

    def of_master(self, plan: UnitPlan) -> torch.dtype:
        low = self.param is not None and self.param.itemsize < 4
        return torch.float32 if low and plan.dtype.is_floating_point else self.of_params(plan)

    def of_grads(self, plan: UnitPlan) -> torch.dtype:
        return self.grad or self.of_master(plan)


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
        lossy_gather: bool = False,
    ) -> None:
        self.plan = plan
        self.key = plan.key
        self.rank = rank
        self.trainable = plan.trainable
        self.keep_whole = keep_whole
        self.params: list[nn.Parameter] = [param for _, param in plan.params]
        self.cut = cut
        self.layout: BucketLayout = plan_layout(((n, p.shape) for n, p in plan.params), world, cut=cut)
        self.dtype = precision.of_params(plan)
        self.grad_dtype = precision.of_grads(plan)
        self.master_dtype = precision.of_master(plan)
        # A lossy gather overwrites the whole copy with what was on the wire, so a master cannot live in it.
        self.separate_master = self.master_dtype != self.dtype or (lossy_gather and keep_whole)
        self.device = device
        self.state = Whole.ABSENT
        self.ticket: Ticket | None = None
        self.gradient: Tensor | None = None
        self.pinned = 0  # how many `gather` contexts want it whole
        self._gone = False
        self._versions: list[int] = []  # of `params`, when they last equalled the masters
        self.has_grad: list[bool] = [False] * len(self.params)  # per slot, on any rank; true after drain
        self.whole: Tensor
        self.local: Tensor
        self._store: Store | None = None
        filler = float("nan") if self.dtype.is_floating_point else 0
        self._poison = torch.full((), filler, dtype=self.dtype, device=device)

    @property
    def span(self) -> slice:
        """This rank's part of the whole buffer."""
        begin = self.rank * self.layout.shard_numel
        return slice(begin, begin + self.layout.shard_numel)

    # -- construction --------------------------------------------------------------------------------------

    def flatten(self) -> Tensor:
        """The parameters' present values in one buffer of their own dtype [numel], padding zero."""
        flat = torch.zeros(self.layout.numel, dtype=self.plan.dtype, device=self.device)
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            flat[slot.start : slot.end].view(slot.shape).copy_(param.detach())
        return flat

    def adopt(self, flat: Tensor, store: Store) -> None:
        """Take `flat` [numel] as the unit's values: cut master and shard, make the parameters views."""
        self._store = store
        self.whole = flat if flat.dtype == self.dtype else flat.to(self.dtype)
        part = self.whole[self.span]
        self.local = part if self.keep_whole else part.clone()
        if self.trainable:
            apart = self.separate_master
            master = flat[self.span].to(self.master_dtype, copy=True) if apart else self.local
            store.create(f"{self.key}/master", master)
        self.state = Whole.READY
        self._point_at_whole()
        self.note_versions()
        if not self.keep_whole:
            self.let_go()

    # -- the whole copy ------------------------------------------------------------------------------------

    def _point_at_whole(self) -> None:
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
            ticket.wait()
        self.ticket = None
        self.state = Whole.READY
        if not self.keep_whole:
            self._point_at_whole()
            self.note_versions()

    def let_go(self) -> None:
        """Free the whole copy. See [Note: buffers are let go by resize]."""
        if self.ticket is not None:
            self.ticket.wait()
            self.ticket = None
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            mark_present(param)
            param.data = self._poison.expand(slot.shape)
        written = None if self._gone else self.lost_write()
        self._shift_versions(gone=True)
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            mark_absent(param, slot.fqn)
        self.whole.untyped_storage().resize_(0)
        self.state = Whole.ABSENT
        if written is not None:
            raise LostWriteError(written)

    def _shift_versions(self, *, gone: bool) -> None:
        """While its values are gone a parameter counts as written, so autograd will not use what it saved.

        Only a backward that runs while the unit is away sees it: the count goes back when the unit arrives.
        """
        if gone != self._gone:
            step = 1 if gone else -1
            torch._C._autograd._unsafe_set_version_counter(
                tuple(self.params), tuple(param._version + step for param in self.params)
            )
            self._gone = gone

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
        return self.master().tensor if self.trainable else self.local

    def refresh_local(self) -> None:
        """Master -> shard in the parameters' dtype (nothing to do where they are the same memory)."""
        if self.trainable and self.separate_master:
            with self.master() as lease:
                self.local.copy_(lease.tensor)

    def absorb_whole(self) -> None:
        """The parameters were written: whole -> shard and master."""
        part = self.whole[self.span]
        if self.local.data_ptr() != part.data_ptr():
            self.local.copy_(part)
        if self.trainable and self.separate_master:
            with self.master() as lease:
                lease.tensor.copy_(part)
                lease.dirty = True
        self.note_versions()
