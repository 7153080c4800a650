"""ChunkedUpdate: any torch optimizer over state that is elsewhere, fetch i+1 | update i | flush i-1."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer
from ds_offload.buffers import Turns
from ds_offload.chunk import ChunkUpdate
from ds_offload.delayed import Delay, DelayStore
from ds_offload.here import begin_here
from ds_offload.pipeline import run_plan
from ds_offload.plan import Chunk, StepPlan, plan_chunks
from ds_offload.speculate import Made, Speculation, SpeculationStore
from ds_offload.states import UnitStates
from ds_offload.twin import Scaling, Twin
from ds_offload.work import Work


class UpdateStore(SpeculationStore, DelayStore, Protocol):
    """What the update asks of the store."""

    def stays(self, key: str, numel: int) -> bool: ...
    def norm_of(self, unit: FlatUnit) -> Tensor: ...
    def abandon(self) -> list[BaseException]: ...


class ChunkedUpdate:
    """Steps a `ShardedOptimizer`'s own optimizer chunk by chunk, on the host.

    A twin of the optimizer sees ordinary parameters: for each chunk its groups hold views of what was
    fetched, and `state` views of their states. Every option, schedule and rule is the optimizer's. After the
    step `state` shows the homes, as plain tensors. Elementwise optimizers are cut anywhere, others between
    parameters.
    [Note: the optimizer's own step] runs afterwards over pieces without a gradient, so it passes them over,
    and counts as the one step that schedules and hooks see.
    """

    def __init__(self, store: UpdateStore, sharded: ShardedOptimizer) -> None:
        self._store = store
        self._sharded = ref(sharded)
        self._pinned = sharded.owner.device.type == "cuda"
        self._turns = Turns(store.policy.depth, pinned=self._pinned)
        self._factor: Tensor | float | None = None
        self.speculation = Speculation(store) if store.policy.update == "speculative" else None
        self.delay = Delay(store) if store.policy.update == "delayed" else None
        self.plan: StepPlan | None = None  # of the last step

    @property
    def _owner(self) -> ShardedOptimizer:
        sharded = self._sharded()
        assert sharded is not None
        return sharded

    # -- what ShardedOptimizer asks ------------------------------------------------------------------------

    def has(self, unit: FlatUnit) -> bool:
        """Is the unit's master, or any state of it, off the device?"""
        return unit.trainable and not self._store.stays(f"{unit.key}/master", unit.layout.shard_numel)

    def norms(self, units: Sequence[FlatUnit]) -> list[Tensor]:
        """Noted when the gradients left; summed now for those that were written since, or stayed."""
        return [self._store.norm_of(unit) for unit in units]

    def scale(self, factor: Tensor | float) -> None:
        """Multiplied as gradients are read by the next `run`."""
        self._factor = factor if self._factor is None else self._factor * factor

    def expect(self, factor: float) -> None:
        if self.speculation is not None:
            self.speculation.expected = factor

    def forget(self) -> None:
        self._factor = None
        if self.speculation is not None:
            self.speculation.forget()

    def cut_anew(self) -> None:
        """States that came along in memory are put into homes by the next `run`."""
        if self.speculation is not None:
            self.speculation.cut_anew()

    def begin(self, unit: FlatUnit) -> None:
        """The store's word that a unit's gradient is in its home, probably for good."""
        sharded = self._sharded()
        if self.speculation is not None and sharded is not None and self.has(unit):
            self.speculation.begin(unit, sharded)

    def close(self) -> None:
        """Workers end."""
        if self.speculation is not None:
            self.speculation.close()
        if self.delay is not None:
            self.delay.close()

    def room(self, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
        """A state's home, the part of one piece, in the piece's shape: to be written, as by a checkpoint."""
        if self.speculation is not None:
            self.speculation.forget()
        return UnitStates(self._store, self._owner).room(piece, name, dtype)

    # -- the step ------------------------------------------------------------------------------------------

    def run(self) -> frozenset[str]:
        """Every unit off the device that has a gradient. Raises AioError, and whatever the optimizer raises.

        After an error chunks before the failing one hold new values and the rest old ones: load a checkpoint.
        """
        try:
            self._run()
        except BaseException:
            self._store.abandon()
            raise
        self._factor = None
        return self._elsewhere

    def _run(self) -> None:
        sharded = self._owner
        if self.delay is not None:
            self.delay.finish()
        states = UnitStates(self._store, sharded)
        works, scaling = self._works(states), self._scaling()
        twin = Twin(sharded.optimizer, scaling)
        if self.delay is not None and self.delay.due():
            self.delay.start(works, states, twin, self._plan, pinned=self._pinned)
        else:
            self._run_now(works, states, twin)

    def _run_now(self, works: Sequence[Work], states: UnitStates, twin: Twin) -> None:
        begin_here(self._owner)
        made = Made()
        if self.speculation is not None:
            made = self.speculation.take_over(works, self._owner, twin.scaling)
        chunks = ChunkUpdate(self._store, states, twin)
        try:
            run_plan(self._plan(works, made.chunks), works, chunks, self._turns)
            made.settle()
        except BaseException:
            made.abandon()
            raise
        after = made.after | chunks.after
        for work in works:
            for piece in work.pieces:
                states.show(piece, after.get(id(piece.param), {}))

    def settle(self) -> None:
        """An update that comes late is finished and published. Collective where there is one."""
        sharded = self._sharded()
        if self.delay is not None and self.delay.pending and sharded is not None:
            sharded.owner.changes.open()
            with torch.no_grad():
                try:
                    self.delay.finish()
                except BaseException:
                    self._store.abandon()
                    raise
                sharded.owner.publish_late(self._elsewhere)

    @property
    def _elsewhere(self) -> frozenset[str]:
        return frozenset(unit.key for unit in self._owner.owner.trainable if self.has(unit))

    def _works(self, states: UnitStates) -> list[Work]:
        """The units with a gradient, in the order in which they are stepped."""
        found: dict[FlatUnit, list[Piece]] = {}
        for piece in self._owner.pieces:
            unit = piece.unit
            if self.has(unit) and unit.gradient is not None and unit.has_grad[piece.overlap.index]:
                found.setdefault(unit, []).append(piece)
        for mine in found.values():
            states.bring_home(mine)
        return [states.work(unit, mine) for unit, mine in found.items()]

    def _plan(self, works: Sequence[Work], made: Set[tuple[str, int]] = frozenset()) -> StepPlan:
        """Every chunk that is not made yet."""
        policy, chunks = self._store.policy, list[Chunk]()
        for number, work in enumerate(works):
            numel, key = work.unit.layout.shard_numel, work.unit.key
            planned = plan_chunks(number, numel, policy.chunk_numel, work.cuts)
            chunks += [chunk for chunk in planned if (key, chunk.begin) not in made]
        widest = max((work.bytes_per_element for work in works), default=0)
        self.plan = StepPlan(tuple(chunks), policy.depth, widest)
        return self.plan

    def _scaling(self) -> Scaling:
        """What gradients are still to be multiplied by."""
        low = any(unit.grad_dtype != torch.float32 for unit in self._owner.owner.trainable)
        return Scaling.of(self._owner.optimizer, self._factor, low=low)
