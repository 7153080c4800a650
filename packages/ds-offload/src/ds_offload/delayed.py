"""The one-step delayed update: beside the next forward and backward, and published by the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_offload.buffers import Turns
from ds_offload.chunk import ChunkUpdate, Fetch
from ds_offload.home import Home
from ds_offload.pipeline import run_plan
from ds_offload.plan import StepPlan
from ds_offload.policy import Tiered
from ds_offload.states import Homes, UnitStates
from ds_offload.twin import Twin
from ds_offload.work import Flat, Work


class DelayStore(Homes, Protocol):
    """What a delayed update asks of the store."""

    policy: Tiered

    def hand_over(self, unit: FlatUnit) -> None:
        """The gradient's home is the update's until the next hand-over; the next gradient has another one."""
        ...


class LateUpdate(ChunkUpdate):
    """In place, but for what forward and backward use meanwhile: new masters and shards go to homes of
    their own, "<unit>/next master" and "<unit>/next param".
    """

    def _bring(self, this: Fetch, name: str, flat: Flat) -> Tensor:
        if name != "master":
            return super()._bring(this, name, flat)
        assert flat.home is not None
        begin, end, into = this.chunk.begin, this.chunk.end, self._master_home(this.work)
        if into.in_memory(begin, end):
            fresh = into.tensor[begin:end]
        else:
            fresh = this.turn.buffer(name, this.chunk.numel, into.dtype)
        this.reading.extend(flat.home.read(begin, fresh))
        return fresh

    def _out(self, this: Fetch) -> Tensor | None:
        into, begin, end = self._out_home(this.work), this.chunk.begin, this.chunk.end
        if into is None or into.in_memory(begin, end):
            return None if into is None else into.tensor[begin:end]
        return this.turn.buffer("out", this.chunk.numel, into.dtype)

    def _master_home(self, work: Work) -> Home:
        return self._next(work.unit, "master", work.unit.master_dtype)

    def _out_home(self, work: Work) -> Home | None:
        unit = work.unit
        return self._next(unit, "param", unit.dtype) if unit.separate_master else None

    def _next(self, unit: FlatUnit, name: str, dtype: torch.dtype) -> Home:
        key = f"{unit.key}/next {name}"
        found = self._homes.home_of(key)
        return found or self._homes.make_home(key, unit.layout.shard_numel, dtype, unit.device)

    def prepare(self, works: Sequence[Work]) -> None:
        """Make the homes. Raises OSError when the disk is full."""
        for work in works:
            self._master_home(work)
            self._out_home(work)

    def publish(self, work: Work) -> None:
        """The unit's masters, shard and states are the new ones."""
        unit, out = work.unit, self._out_home(work)
        assert work.master.home is not None
        work.master.home.become(self._master_home(work))
        shard = None if unit.shard_key is None else self._homes.home_of(unit.shard_key)
        if out is not None and shard is not None:
            shard.become(out)
        elif out is not None:
            unit.local.copy_(out.tensor)
        for piece in work.pieces:
            self._states.show(piece, self.after.get(id(piece.param), {}))


@dataclass(frozen=True, slots=True)
class _Pending:
    """An update under way."""

    works: Sequence[Work]
    update: LateUpdate
    future: Future[None]


class Delay:
    """The one-step delayed parameter update of Ren et al., "ZeRO-Offload", 2021, as a mode of its own.

    [Note: one step late] `step` t waits for update t - 1, publishes it, and starts update t from the gradient
    of step t, with the options, the factor and the moments of that moment; it runs while forward and
    backward t + 1 use weights that lack it:

        w[t + 1] = w[t] + u(m[t], g(w[t - 1 published])),   published after step t: w[t]

    Parameters and masters show what is published; the moments of an update under way must not be looked at
    before `settle`, which waits for it and publishes at once. That is what everything does that reads or
    writes state between two steps: checkpoints, `full_tensor`, changes of the model. The step after it then
    starts from weights that lack nothing, in the run that saved as in the one that resumed. The steps before
    `delay_after` are plain: weights move fastest at first. A step that is skipped publishes nothing.

    It holds a second gradient, master and low precision shard of every unit, where those live: at worst 10
    bytes per parameter more (12 in fp32). It pays where host or disk would work while a device waits.
    """

    def __init__(self, store: DelayStore) -> None:
        self._store = store
        self._pool: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None
        self._turns: Turns | None = None
        self._steps = 0
        self.delayed_steps = 0

    def due(self) -> bool:
        """Is the step that begins a delayed one? Counts it."""
        self._steps += 1
        return self._steps > self._store.policy.delay_after

    @property
    def pending(self) -> bool:
        """Is an update not published yet?"""
        return self._pending is not None

    def start(
        self,
        works: Sequence[Work],
        states: UnitStates,
        twin: Twin,
        plan: Callable[[Sequence[Work]], StepPlan],
        *,
        pinned: bool,
    ) -> None:
        """The update of these works begins; all before are published. Raises OSError when a disk is full."""
        assert self._pending is None
        update = LateUpdate(self._store, states, twin)
        update.prepare(works)
        mine = [self._given(work) for work in works]
        if self._turns is None:
            self._turns = Turns(self._store.policy.depth, pinned=pinned)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ds-offload-delayed")
        assert self._pool is not None
        self.delayed_steps += 1
        future = self._pool.submit(_run, plan(mine), mine, update, self._turns)
        self._pending = _Pending(mine, update, future)

    def _given(self, work: Work) -> Work:
        """The work with a gradient that nobody else writes."""
        if work.gradient.home is None:
            return replace(work, gradient=Flat(work.gradient.tensor.to("cpu", copy=True)))
        self._store.hand_over(work.unit)
        return work

    def finish(self) -> bool:
        """Wait for the update under way and make it visible; was there one? Raises what went wrong in it,
        once: states then are partly new, so load a checkpoint.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        pending.future.result()
        for work in pending.works:
            pending.update.publish(work)
        return True

    def close(self) -> None:
        """Wait for the worker and end it; what is not published by `settle` is lost."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _run(plan: StepPlan, works: Sequence[Work], update: LateUpdate, turns: Turns) -> None:
    with torch.no_grad():
        run_plan(plan, works, update, turns)
