"""Speculation: units are updated while the backward still runs, apart, and taken over if that was right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer
from ds_offload.buffers import Turn
from ds_offload.chunk import ChunkUpdate, Fetch, Loaded
from ds_offload.home import Home
from ds_offload.plan import Chunk, plan_chunks
from ds_offload.policy import Tiered
from ds_offload.states import Homes, UnitStates, is_cut
from ds_offload.twin import Scaling, Twin, same
from ds_offload.work import Flat, Work

_log = logging.getLogger("ds_offload")


class SpeculationStore(Homes, Protocol):
    """What speculation asks of the store."""

    policy: Tiered

    def sight(self, unit: FlatUnit) -> tuple[int, int]:
        """(how often its gradient was kept, how often its master was reached for): equal, nothing new."""
        ...


@dataclass(frozen=True, slots=True)
class Counts:
    """Chunks of the last step, or of the last gradients that were dropped: updated during the backward, of
    these taken over, and of these thrown away.
    """

    speculated: int = 0
    kept: int = 0
    rolled_back: int = 0


class _Unforeseen(Exception):
    """The optimizer makes a state that was not there."""


class ApartUpdate(ChunkUpdate):
    """Reads homes, and writes nothing but the turn's buffers until `take_over`."""

    def _bring(self, this: Fetch, name: str, flat: Flat) -> Tensor:
        assert flat.home is not None
        buffer = this.turn.buffer(name, this.chunk.numel, flat.home.dtype)
        this.reading.extend(flat.home.read(this.chunk.begin, buffer))
        return buffer

    def _out(self, this: Fetch) -> Tensor | None:
        unit = this.work.unit
        return this.turn.buffer("out", this.chunk.numel, unit.dtype) if unit.separate_master else None

    def _new_state(self, now: Loaded, name: str, dtype: torch.dtype) -> Tensor:
        raise _Unforeseen(name)

    def flush(self, now: Loaded) -> None:
        """Not before it is known to be right."""

    def take_over(self, now: Loaded) -> None:
        """What is in the buffers becomes the unit's. Memory changes places, the file's part is written."""
        unit, begin, numel, turn = now.work.unit, now.chunk.begin, now.chunk.numel, now.turn
        gradient = now.work.gradient.home
        if gradient is not None and gradient.in_memory(begin, begin + numel):
            gradient.take(begin, turn.memory("grad"), numel)  # scaled, as an update in place leaves it
        changed: list[tuple[str, Home | None]] = [("master", now.work.master.home)]
        changed += [(f"state {name}", flat.home) for name, flat in now.work.states.items()]
        if now.out is not None:
            home = self._out_home(now.work)
            changed.append(("out", home))
            if home is None:
                unit.local[begin : begin + numel].copy_(now.out)
        for name, home in changed:
            if home is not None:
                turn.flushing += home.take(begin, turn.memory(name), numel)


@dataclass(frozen=True, slots=True)
class Made:
    """What a step takes over: chunks by (unit, begin), and the numbers that they left, by piece."""

    chunks: frozenset[tuple[str, int]] = frozenset()
    after: dict[int, dict[str, Any]] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    def settle(self) -> None:
        """Its writes have arrived. Raises AioError."""
        for turn in self.turns:
            turn.empty()

    def abandon(self) -> None:
        """Its writes are over, whatever became of them."""
        for turn in self.turns:
            turn.abandon()


@dataclass(slots=True)
class _Guess:
    """One unit's update made ahead: of which work, seen how, and how far it came."""

    work: Work
    seen: tuple[Any, ...]
    update: ApartUpdate
    future: Future[None] | None = None
    stop: bool = False
    done: list[Loaded] = field(default_factory=list)


class Speculation:
    """One worker thread updates units whose gradients are final while the backward goes on.

    [Note: speculation is apart] What an update writes is in buffers until the step has found that gradients,
    options and states are those that it started from, and that their factor is the one that was foreseen:
    unscaled, not clipped. Then the buffers' pages and the homes' change places; else they are forgotten, and
    "rolled back" is that nothing ever happened. So nobody, be it the backward under way, a checkpoint or a
    look at `optimizer.state`, ever sees a value that a plain step would not have shown.

    The buffers stay: `speculate_bytes` bounds them, and chunks beyond it wait for the step, as do those that
    the worker has not come to. A unit takes part from its second step on, when all its parameters are this
    optimizer's. Where forward and backward run on the cores that the update needs, as on a CPU, it hides
    reads of a file at best and gains nothing in memory (benchmarks/README.md): what counts is the time in
    which host or disk would have waited for a device.

    What the check cannot see is a write through `.data` to a shard in `optimizer.param_groups` between the
    backward and the step; write under `torch.no_grad()` instead.
    """

    def __init__(self, store: SpeculationStore) -> None:
        self._store = store
        self._pool: ThreadPoolExecutor | None = None
        self._turns: dict[tuple[str, int], Turn] = {}
        self._reserved = 0  # bytes of the turns
        self._known: dict[str, tuple[int, ...]] = {}  # the slots that each unit's last step updated
        self._twin: Twin | None = None
        self._guesses: dict[str, _Guess] = {}
        self._stale: list[_Guess] = []  # of gradients that were kept again
        self.expected: float | None = None  # what the engine says about the next factor
        self.counts = Counts()

    # -- during the backward -------------------------------------------------------------------------------

    def begin(self, unit: FlatUnit, sharded: ShardedOptimizer) -> None:
        """Update a unit whose gradient is in its home, as far as one can tell the final one."""
        states = UnitStates(self._store, sharded)
        pieces = self._foreseen(unit, sharded)
        if not pieces or not _all_in_homes(pieces, states, sharded):
            return
        work = states.work(unit, pieces)
        if work.gradient.home is None or work.master.home is None:
            return
        if self._twin is None:
            self._twin = Twin(sharded.optimizer, self._foreseen_scaling(sharded.optimizer))
        before = self._guesses.pop(unit.key, None)
        if before is not None:
            before.stop = True
            self._stale.append(before)
        update = ApartUpdate(self._store, states, self._twin)
        guess = self._guesses[unit.key] = _Guess(work, self._seen(work), update)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ds-offload-speculation")
        guess.future = self._pool.submit(self._work, guess)

    def _foreseen(self, unit: FlatUnit, sharded: ShardedOptimizer) -> list[Piece]:
        """The pieces that the last step updated; none of a unit that others write, too."""
        known = self._known.get(unit.key, ())
        alone = len(sharded.slots.get(unit, ())) == len(unit.params)
        if not known or not alone or sharded.owner.replicas.world > 1:  # gradients are summed once more then
            return []
        return [piece for piece in sharded.pieces if piece.unit is unit and piece.overlap.index in known]

    def _foreseen_scaling(self, optimizer: Any) -> Scaling:
        own = getattr(optimizer, "clip_coef", None)
        if self.expected is not None:
            return Scaling(None, self.expected) if own is None else Scaling(own * self.expected, None)
        return Scaling(own, None)

    def _work(self, guess: _Guess) -> None:
        """On the worker."""
        work, numel = guess.work, self._store.policy.chunk_numel
        try:
            with torch.no_grad():
                for chunk in plan_chunks(0, work.unit.layout.shard_numel, numel, work.cuts):
                    if guess.stop:
                        return
                    turn = self._turn(chunk, work)
                    if turn is not None:
                        now = guess.update.fetch(chunk, work, turn)
                        guess.update.update(now)
                        guess.done.append(now)
        except _Unforeseen:
            return

    def _turn(self, chunk: Chunk, work: Work) -> Turn | None:
        """The buffers of a chunk, its own; None beyond the bytes that are allowed."""
        key = work.unit.key, chunk.begin
        if key not in self._turns:
            wanted = chunk.numel * work.bytes_per_element
            if self._reserved + wanted > self._store.policy.speculate_bytes:
                return None
            self._reserved += wanted
            self._turns[key] = Turn(pinned=False)
        return self._turns[key]

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(turn.nbytes for turn in self._turns.values())

    # -- at the step ---------------------------------------------------------------------------------------

    def take_over(self, works: Sequence[Work], sharded: ShardedOptimizer, scaling: Scaling) -> Made:
        """What was right becomes true, the rest is forgotten. Raises what the worker raised, having changed
        nothing.
        """
        twin, guesses = self._twin, dict(self._guesses)
        done = self._halt()
        right = twin is not None and twin.matches(sharded.optimizer) and scaling.same(twin.scaling)
        chunks: list[tuple[str, int]] = []
        after: dict[int, dict[str, Any]] = {}
        turns: list[Turn] = []
        for work in works:
            guess = guesses.get(work.unit.key)
            if right and guess is not None and guess.done and self._holds(guess, work):
                for now in guess.done:
                    guess.update.take_over(now)
                    chunks.append((work.unit.key, now.chunk.begin))
                    turns.append(now.turn)
                after |= guess.update.after
            self._known[work.unit.key] = tuple(piece.overlap.index for piece in work.pieces)
        self.counts = Counts(done, len(chunks), done - len(chunks))
        return Made(frozenset(chunks), after, tuple(turns))

    def _holds(self, guess: _Guess, work: Work) -> bool:
        old = guess.work
        return (
            guess.seen == self._seen(work)
            and [id(piece) for piece in old.pieces] == [id(piece) for piece in work.pieces]
            and old.gradient.home is work.gradient.home
            and list(old.states) == list(work.states)
            and all(flat.home is work.states[name].home for name, flat in old.states.items())
            and same(old.numbers, work.numbers)
        )

    def _seen(self, work: Work) -> tuple[Any, ...]:
        """Whatever changes when anybody writes to what the update reads."""
        flats = [work.master, work.gradient, *work.states.values()]
        versions = [flat.tensor._version for flat in flats]
        versions += [piece.param._version for piece in work.pieces]
        return (*self._store.sight(work.unit), work.unit.edition, *versions)

    def forget(self) -> None:
        """The gradients were dropped: nothing happened."""
        if self._twin is None:
            return
        try:
            done = self._halt()
        except Exception as error:
            _log.warning("ds-offload: an update ahead of a step that never came failed: %s", error)
            done = 0
        self.counts = Counts(done, 0, done)

    def cut_anew(self) -> None:
        """Other units from here on."""
        self.forget()
        self._known.clear()
        self._turns.clear()
        self._reserved = 0

    def close(self) -> None:
        """End the worker."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _halt(self) -> int:
        """The worker stops after its chunk. Returns how many chunks it has done; raises what it raised."""
        guesses = [*self._stale, *self._guesses.values()]
        self._twin, self._guesses, self._stale = None, {}, []
        for guess in guesses:
            guess.stop = True
        futures = [guess.future for guess in guesses if guess.future is not None]
        waited = [future for future in futures if not future.cancel()]
        errors = [error for future in waited if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return sum(len(guess.done) for guess in guesses)


def _all_in_homes(pieces: Sequence[Piece], states: UnitStates, sharded: ShardedOptimizer) -> bool:
    """Do all states that are cut live where they belong?"""
    for piece in pieces:
        for name, value in sharded.optimizer.state.get(piece.param, {}).items():
            if is_cut(value, piece.param) and not states.is_home(piece, name, value):
                return False
    return True
