"""ChunkedUpdate: any torch optimizer over state that is elsewhere, fetch i+1 | update i | flush i-1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer, whole_groups
from ds_offload.buffers import Turns
from ds_offload.chunk import ChunkUpdate, Loaded
from ds_offload.groups import Groups
from ds_offload.plan import Chunk, StepPlan, plan_chunks
from ds_offload.policy import Tiered
from ds_offload.states import Homes, UnitStates


class UpdateStore(Homes, Protocol):
    """What the update asks of the store."""

    policy: Tiered

    def stays(self, key: str, numel: int) -> bool: ...
    def norm_of(self, unit: FlatUnit) -> Tensor: ...
    def settle(self) -> None: ...


class ChunkedUpdate:
    """Steps a `ShardedOptimizer`'s own optimizer chunk by chunk, on the host.

    The optimizer sees ordinary parameters: for each chunk its groups hold views of what was fetched, and
    `state` views of their states. Every option, schedule and rule is its own. After the step `state` shows
    the homes, as plain tensors. Elementwise optimizers are cut anywhere, others between parameters.
    [Note: the optimizer's own step] runs afterwards over pieces without a gradient, so it passes them over,
    and counts as the one step that schedules and hooks see.
    """

    def __init__(self, store: UpdateStore, sharded: ShardedOptimizer) -> None:
        self._store = store
        self._sharded = ref(sharded)
        self._turns = Turns(store.policy.depth, pinned=sharded.owner.device.type == "cuda")
        self._factor: Tensor | float | None = None
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

    def forget(self) -> None:
        self._factor = None

    def cut_anew(self) -> None:
        """Nothing is kept by unit: states that came along in memory are put into homes by the next `run`."""

    def room(self, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
        """A state's home, the part of one piece, in the piece's shape."""
        return UnitStates(self._store, self._owner).room(piece, name, dtype)

    # -- the step ------------------------------------------------------------------------------------------

    def run(self) -> frozenset[str]:
        """Every unit off the device that has a gradient. Raises AioError, and whatever the optimizer raises.

        After an error chunks before the failing one hold new values and the rest old ones: load a checkpoint.
        """
        sharded, optimizer = self._owner, self._owner.optimizer
        states = UnitStates(self._store, sharded)
        pieces = self._pieces()
        for mine in pieces.values():
            states.bring_home(mine)
        units = list(pieces)
        self.plan = self._plan(pieces, states)
        chunks = ChunkUpdate(self._store, states, optimizer)
        with Groups(optimizer) as groups, self._scaled(optimizer) as factor:
            loaded: dict[int, Loaded] = {}
            try:
                for fetched, updated, _ in self.plan.rounds():
                    for index in fetched:
                        chunk = self.plan.chunks[index]
                        unit = units[chunk.unit]
                        loaded[index] = chunks.fetch(chunk, unit, pieces[unit], self._turns[index])
                    now = loaded.pop(updated)
                    chunks.update(now, pieces[now.unit], groups, factor)
                    chunks.flush(now)
                self._turns.empty()
            except BaseException:
                for left in loaded.values():
                    for future in left.reading:
                        future.exception()
                self._turns.abandon()
                with contextlib.suppress(OSError):  # the one that is raised already says it
                    self._store.settle()
                raise
        for mine in pieces.values():
            for piece in mine:
                states.show(piece, chunks.after.get(id(piece.param), {}))
        self._factor = None
        return frozenset(unit.key for unit in sharded.owner.trainable if self.has(unit))

    def _pieces(self) -> dict[FlatUnit, list[Piece]]:
        """The pieces with a gradient, by unit, in the order in which units are stepped."""
        found: dict[FlatUnit, list[Piece]] = {}
        for piece in self._owner.pieces:
            unit = piece.unit
            if self.has(unit) and unit.gradient is not None and unit.has_grad[piece.overlap.index]:
                found.setdefault(unit, []).append(piece)
        return found

    def _plan(self, pieces: dict[FlatUnit, list[Piece]], states: UnitStates) -> StepPlan:
        policy, chunks, widest = self._store.policy, list[Chunk](), 0
        whole = self._seen_whole()
        for number, (unit, mine) in enumerate(pieces.items()):
            cuts = None
            if unit.cut == "whole" or any(id(piece.param) in whole for piece in mine):
                cuts = [part.local[1] for part in unit.layout.overlaps(unit.rank)]
            chunks += plan_chunks(number, unit.layout.shard_numel, policy.chunk_numel, cuts)
            dtypes = [unit.master_dtype, unit.grad_dtype, *(h.dtype for h in states.of(unit, mine).values())]
            dtypes += [unit.dtype] if unit.separate_master else []
            widest = max(widest, sum(dtype.itemsize for dtype in dtypes))
        return StepPlan(tuple(chunks), policy.depth, widest)

    def _seen_whole(self) -> set[int]:
        """Ids of what an optimizer must see whole, also where nothing cuts it: one rank, stage 0."""
        optimizer = self._owner.optimizer
        chosen = whole_groups(optimizer)
        return {id(p) for group in optimizer.param_groups if id(group) in chosen for p in group["params"]}

    @contextlib.contextmanager
    def _scaled(self, optimizer: Any) -> Iterator[Tensor | float | None]:
        """What gradients are still to be multiplied by; None where the optimizer does it as it reads them, in
        the same arithmetic.
        """
        own = getattr(optimizer, "clip_coef", None)
        low = any(unit.grad_dtype != torch.float32 for unit in self._owner.owner.trainable)
        if own is None or self._factor is None or low:
            yield self._factor
            return
        optimizer.clip_coef = own * self._factor
        try:
            yield None
        finally:
            optimizer.clip_coef = own
