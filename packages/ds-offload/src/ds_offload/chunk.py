"""One chunk of an update: fetched, shown to the optimizer as ordinary parameters, flushed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.train.holdings import Piece
from ds_offload.buffers import Turn
from ds_offload.home import Home
from ds_offload.plan import Chunk
from ds_offload.states import Homes, UnitStates, is_cut
from ds_offload.twin import Twin
from ds_offload.work import IN_HOME, Flat, Work


@dataclass(slots=True)
class Fetch:
    """A chunk on its way: what of, into whose buffers, and the reads under way."""

    chunk: Chunk
    work: Work
    turn: Turn
    reading: list[Future[int]] = field(default_factory=list)


@dataclass(slots=True)
class Loaded:
    """One chunk with everything its update reads and writes, flat and of the chunk's length, on the host."""

    chunk: Chunk
    work: Work
    turn: Turn
    master: Tensor
    grad: Tensor
    out: Tensor | None  # where the shard in the parameters' dtype is written, if it is another tensor
    states: dict[str, Tensor]
    reading: list[Future[int]] = field(default_factory=list)


@dataclass(slots=True)
class _Shown:
    """One piece's part of a chunk, as the optimizer sees it."""

    piece: Piece
    param: nn.Parameter
    part: slice  # of the chunk


class ChunkUpdate:
    """Fetches, updates and flushes chunks of works with one twin of the optimizer, in place.

    `after[id(piece.param)]` collects what the optimizer left as the state of each piece, by name: numbers,
    and None for what is in a home.
    """

    def __init__(self, homes: Homes, states: UnitStates, twin: Twin) -> None:
        self._homes, self._states, self._twin = homes, states, twin
        self.after: dict[int, dict[str, Any]] = {}

    # -- fetch ---------------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, work: Work, turn: Turn) -> Loaded:
        """Views of what is in memory; reads of what is not, into the turn's buffers."""
        turn.empty()
        this = Fetch(chunk, work, turn)
        try:
            return self._fetch(this)
        except BaseException:
            for future in this.reading:  # the buffers are used again
                future.exception()
            raise

    def _fetch(self, this: Fetch) -> Loaded:
        work = this.work
        states = {name: self._bring(this, f"state {name}", flat) for name, flat in work.states.items()}
        master = self._bring(this, "master", work.master)
        grad = self._bring(this, "grad", work.gradient)
        return Loaded(this.chunk, work, this.turn, master, grad, self._out(this), states, this.reading)

    def _bring(self, this: Fetch, name: str, flat: Flat) -> Tensor:
        home, begin, end = flat.home, this.chunk.begin, this.chunk.end
        if home is None:
            return flat.tensor[begin:end].to("cpu")
        if home.in_memory(begin, end):
            return home.tensor[begin:end]
        buffer = this.turn.buffer(name, this.chunk.numel, home.dtype)
        this.reading.extend(home.read(begin, buffer))
        return buffer

    def _out(self, this: Fetch) -> Tensor | None:
        unit, begin, end = this.work.unit, this.chunk.begin, this.chunk.end
        if not unit.separate_master:
            return None
        home = self._out_home(this.work)
        in_place = home is None or home.in_memory(begin, end)
        if in_place and unit.local.device.type == "cpu":
            return unit.local[begin:end]
        return this.turn.buffer("out", this.chunk.numel, unit.dtype)

    def _master_home(self, work: Work) -> Home | None:
        return work.master.home

    def _out_home(self, work: Work) -> Home | None:
        key = work.unit.shard_key
        return None if key is None else self._homes.home_of(key)

    # -- update --------------------------------------------------------------------------------------------

    def update(self, now: Loaded) -> None:
        """One step of the optimizer's rule over the work's part of the chunk."""
        errors = [error for future in now.reading if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        shown = []
        for piece in now.work.pieces:
            low, high = piece.overlap.local
            at = now.chunk.begin
            part = slice(max(low, at) - at, min(high, now.chunk.end) - at)
            if part.start < part.stop:
                shown.append(self._show(now, piece, part))
        copied = self._offer_out(now, shown)
        try:
            self._twin.step([(each.piece, each.param) for each in shown])
        finally:
            left = [self._take_back(each) for each in shown]
        for each, state in zip(shown, left, strict=True):
            self._keep(now, each, state)
        if now.out is not None and not copied:
            now.out.copy_(now.master)

    def _show(self, now: Loaded, piece: Piece, part: slice) -> _Shown:
        optimizer, numel = self._twin.optimizer, part.stop - part.start
        shape = piece.param.shape if numel == piece.param.numel() else (numel,)
        param = nn.Parameter(now.master[part].view(shape))
        gradient = now.grad[part].view(shape)
        if self._twin.scaling.before is not None:
            gradient.mul_(self._twin.scaling.before)
        direct = getattr(optimizer, "low_precision_grads", None)
        if gradient.dtype == param.dtype:
            param.grad = gradient
        elif direct is not None:
            direct[param] = gradient
        else:
            param.grad = gradient.to(param.dtype)
        state: dict[str, Any] = {}
        for name, value in now.work.numbers[id(piece.param)].items():
            if value is IN_HOME:
                state[name] = now.states[name][part].view(shape)
            else:
                state[name] = value.clone() if isinstance(value, Tensor) else value
        if state:
            optimizer.state[param] = state
        return _Shown(piece, param, part)

    def _offer_out(self, now: Loaded, shown: Sequence[_Shown]) -> bool:
        """Let the optimizer write the low precision shard in the same pass. True when that is all of it."""
        copy_out = getattr(self._twin.optimizer, "copy_out", None)
        overflow = getattr(self._twin.optimizer, "found_inf", None)
        if now.out is None or copy_out is None or (overflow is not None and float(overflow)):
            return False
        for each in shown:
            copy_out[each.param] = now.out[each.part]
        return sum(each.param.numel() for each in shown) == now.chunk.numel

    def _take_back(self, shown: _Shown) -> dict[str, Any]:
        """The twin forgets what it was shown; what it left as its state."""
        optimizer = self._twin.optimizer
        for kept in (getattr(optimizer, name, None) for name in ("copy_out", "low_precision_grads")):
            if kept is not None:
                kept.pop(shown.param, None)
        state: dict[str, Any] = optimizer.state.pop(shown.param, {})
        return state

    def _keep(self, now: Loaded, shown: _Shown, state: dict[str, Any]) -> None:
        """States into the chunk's, numbers aside until the last chunk is done."""
        after = self.after[id(shown.piece.param)] = {}
        for name, value in state.items():
            if not is_cut(value, shown.param):
                after[name] = value
                continue
            after[name] = None  # keeps its place among the names
            if name not in now.states:
                now.states[name] = self._new_state(now, name, value.dtype)
            here = now.states[name][shown.part].view(value.shape)
            if here.data_ptr() != value.data_ptr():
                here.copy_(value)

    def _new_state(self, now: Loaded, name: str, dtype: torch.dtype) -> Tensor:
        home, chunk = self._states.home(now.work.unit, name, dtype), now.chunk
        if home.in_memory(chunk.begin, chunk.end):
            return home.tensor[chunk.begin : chunk.end]
        buffer = now.turn.buffer(f"state {name}", chunk.numel, dtype)
        for future in home.read(chunk.begin, buffer):  # what an earlier step made of the unit's other pieces
            future.result()
        return buffer

    # -- flush ---------------------------------------------------------------------------------------------

    def flush(self, now: Loaded) -> None:
        """What was changed goes back, without waiting."""
        homes, unit, begin, end = self._homes, now.work.unit, now.chunk.begin, now.chunk.end
        changed = [(self._master_home(now.work), now.master)]
        changed += [(homes.home_of(f"{unit.key}/{name}"), state) for name, state in now.states.items()]
        if now.out is not None:
            home = self._out_home(now.work)
            changed.append((home, now.out))
            if home is None and now.out.device != unit.local.device:
                unit.local[begin:end].copy_(now.out, non_blocking=True)
        for home, values in changed:
            if home is not None and not home.in_memory(begin, end):
                now.turn.flushing += home.write(begin, values)
