"""ZenFlowUpdate: a few columns now, on the device; the rest is added up and applied later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_core.train.optim import ShardedOptimizer, cut_for
from ds_offload.in_steps import InSteps
from ds_offload.step import ChunkedUpdate
from ds_offload.zen_choice import Choice, Energy, Unmeasured
from ds_offload.zen_now import Selected
from ds_offload.zen_rest import Rest, counted
from ds_offload.zen_rule import refuse_rule
from ds_offload.zen_select import Judge
from ds_offload.zen_state import (
    SUMS,
    Progress,
    put_in_groups,
    put_in_states,
    take_from_groups,
    take_from_states,
)
from ds_offload.zen_view import FlowStore, View, by_unit
from ds_offload.zenflow import AUTO_LONGEST, Traffic, ZenFlow


class ZenFlowUpdate(InSteps):
    """An `Elsewhere` by ZenFlow's rule; `ds_offload.zenflow.ZenFlow` says what it computes.

    [Note: held, flying and looked at] Between steps the truth is in three places: `Selected` has the newest
    selected elements, homes have everything else, and an update under way writes beside the homes, into
    targets that are copied there when it lands, at the end of the next interval. So homes never show half an
    update, and training does not depend on how fast the thread is. Whoever looks at a master through the
    store (checkpoints, `full_tensor`, averages) makes `put_away` run first: selected elements go home, sums
    and counters into `optimizer.state` and the groups. The next step takes them from there, wherever they
    come from: a look, a checkpoint, or units that were cut anew.
    """

    def __init__(self, store: FlowStore, sharded: ShardedOptimizer, flow: ZenFlow) -> None:
        refuse_rule(sharded.optimizer, cut_for(sharded.optimizer))
        self.flow = flow
        self._plain = ChunkedUpdate(store, sharded)
        self._view = View(store, sharded, _anew(flow))
        self._selected = Selected(self._view)
        self._rest = Rest(self._view, self._selected, pinned=sharded.owner.device.type == "cuda")
        self._choice = Choice(self._view, flow.topk_ratio)
        self._factor: Tensor | float | None = None
        self._live = False  # is anything here newer than what others see?
        self._put: Any = None  # what `put_away` left in the groups
        store.lookers.append(WeakMethod(self.put_away))

    @property
    def progress(self) -> Progress:
        """Counters and the selection, to be looked at."""
        return self._view.progress

    # -- what ShardedOptimizer asks ------------------------------------------------------------------------

    def has(self, unit: FlatUnit) -> bool:
        """Is the unit's master, or any state of it, off the device?"""
        return self._view.has(unit)

    def norms(self, units: Sequence[FlatUnit]) -> list[Tensor]:
        """Of whole gradients, selected or not."""
        return self._plain.norms(units)

    def scale(self, factor: Tensor | float) -> None:
        """For the gradients of the next `run`, where they are added up too."""
        self._factor = factor if self._factor is None else self._factor * factor

    def forget(self) -> None:
        """Gradients were dropped; those that were added up in earlier steps are not."""
        self._factor = None
        self._plain.forget()

    def cut_anew(self) -> None:
        """What was put away went along with parameters and groups; nothing here is of use."""
        self._drop()

    def room(self, piece: Piece, name: str, dtype: torch.dtype) -> Tensor:
        """A state's home, for a checkpoint that is about to be read: what is known here is of the past."""
        self.put_away()  # masters may stay as they are
        if self._put is not None:
            self._drop()
            take_from_groups(self._view.optimizer)
        return self._plain.room(piece, name, dtype)

    def close(self) -> None:
        """The worker ends; what it was making comes to nothing."""
        self._rest.close()
        self._plain.close()

    def _drop(self) -> None:
        self._rest.drop()
        self._selected.drop()
        self._live, self._put = False, None

    # -- the step ------------------------------------------------------------------------------------------

    def run(self) -> frozenset[str]:
        """Update what is due. Raises AioError, and whatever the optimizer raises; the error of an update
        beside the training comes before this step changes anything, and the next step starts it again.
        """
        optimizer = self._view.optimizer
        found = getattr(optimizer, "found_inf", None)
        if found is not None and float(found):
            return frozenset()
        self._take_in()
        try:
            self._run()
        finally:
            self._live = True
        self._factor = None
        return frozenset(unit.key for unit in self._view.sharded.owner.trainable if self.has(unit))

    def _run(self) -> None:
        flow = self.progress
        if flow.selection or flow.step >= self.flow.warmup:
            interval = self.flow.update_interval
            if flow.flying and (interval == "auto" or flow.filled + 1 >= interval):
                self._rest.ready()
            self._step(counted(self._view.pieces()))
            return
        if self._factor is not None:
            self._plain.scale(self._factor)
        self._plain.run()
        flow.step += 1
        if flow.step == self.flow.warmup:
            self._choice.select(self._rest.numbers)

    def _step(self, pieces: Sequence[Piece]) -> None:
        flow, known, late = self.progress, list[Piece](), list[Piece]()
        for piece in pieces:
            (late if self._view.columns(piece) is None else known).append(piece)
        judged = "auto" in (self.flow.update_interval, self.flow.select_interval)
        energies = Energy() if judged else Unmeasured()
        self._selected.update(known, self._scaled, energies.inside)
        self._rest.add_up(known, self._scaled, energies.whole)
        if late:
            self._rest.apply_whole(late, self._scaled)
        flow.step += 1
        flow.filled += 1
        self._choice.judge(energies)
        interval = self.flow.update_interval
        over = flow.filled >= (AUTO_LONGEST if interval == "auto" else interval)
        if over or (interval == "auto" and flow.judge.ends()):
            self._close()

    def _close(self) -> None:
        """The interval is over: what was applied beside it lands, what it added up is applied.

        Columns are chosen anew when nothing is under way, whose sums would be of the old ones.
        """
        flow, interval = self.progress, self.flow.select_interval
        flow.since += flow.filled
        flow.filled = 0
        lost = flow.judge.close()
        again = lost if interval == "auto" else flow.since >= interval
        again |= any(
            fqn not in flow.selection and unit.has_grad[index]
            for fqn, (unit, index) in self._view.slots().items()
        )
        changed = self._rest.land() if flow.flying else set()
        if self.flow.overlap and not again:
            if flow.counts:
                self._rest.launch()
        else:
            changed |= self._rest.apply()
        self._rest.show(changed)
        if again:
            self._selected.put_back()
            self._choice.select(self._rest.numbers)

    def _scaled(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """With every factor in it, in the order in which plain training multiplies."""
        optimizer, factor = self._view.optimizer, self._factor
        own: Any = getattr(optimizer, "clip_coef", None)
        if isinstance(factor, Tensor):
            factor = factor.to(gradient.device)
        if own is None:
            return (gradient if factor is None else gradient * factor).to(dtype)
        own = own / getattr(optimizer, "grad_scale", 1.0)
        if isinstance(own, Tensor):
            own = own.to(gradient.device)
        if factor is not None and gradient.dtype == torch.float32:
            own, factor = own * factor, None
        given = (gradient if factor is None else gradient * factor).to(dtype)
        return given if isinstance(own, float) and own == 1.0 else given * own

    # -- looked at -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def put_away(self) -> None:
        """Somebody looks: everything where others find it. See [Note: held, flying and looked at]."""
        if not self._live:
            return
        self._live = False
        self._selected.put_back()
        flow, view = self.progress, self._view
        for piece in view.pieces():
            sums = {}
            for counts, turn in ((flow.counts, flow.turn), (flow.flying, flow.turn ^ 1)):
                if piece.fqn in counts:
                    sums[SUMS[turn]] = view.states.room(piece, SUMS[turn], piece.unit.master_dtype)
            put_in_states(view.optimizer, piece, sums, self._rest.numbers.get(piece.fqn, {}))
        self._put = flow.save()
        put_in_groups(view.optimizer, self._put)
        self._rest.note()

    def _take_in(self) -> None:
        """The other way, from wherever it comes."""
        if self._live:
            self._live = False  # the step itself looks, too
            return
        view, pieces = self._view, self._view.pieces()
        saved = take_from_groups(view.optimizer)
        for members in by_unit(pieces).values():
            view.states.bring_home(members)
        self._rest.numbers = take_from_states(view.optimizer, pieces)
        if saved is None or saved is not self._put:
            self._rest.abandon()
            view.progress = _anew(self.flow)
            if saved is not None:
                view.progress.load(saved, view.optimizer)
                view.progress.keep(view.slots().keys())
        self._rest.resume()

    # -- looking -------------------------------------------------------------------------------------------

    @property
    def nbytes_beside(self) -> int:
        """What updates beside the training take: masters and states once more, where those live."""
        return self._rest.nbytes_beside

    @property
    def nbytes_selected(self) -> int:
        """Masters and states of selected elements on the device."""
        return self._selected.nbytes

    def traffic(self) -> Traffic:
        """Bytes per step between device and host, by the present selection: see `Traffic`.

        Gradients leave whole, in the dtype in which they accumulate, and the selected ones come back from the
        host. New values of a parameter come back once an interval, whole; never where a shard at stage 3
        lives off the device, which is fetched when it is used. An automatic interval counts as the longest.
        """
        view, interval = self._view, self.flow.update_interval
        steps = AUTO_LONGEST if interval == "auto" else interval
        leaving, coming, plain, selecting = 0, 0.0, 0, 0
        for piece in view.pieces():
            unit, numel = piece.unit, piece.param.numel()
            grad, item = unit.grad_dtype.itemsize, unit.dtype.itemsize
            count = view.part(piece).count
            fetched = unit.shard_key is not None and view.store.home_of(unit.shard_key) is not None
            leaving += numel * grad
            coming += count * grad
            if not fetched:
                plain += numel * item
                coming += numel * item / steps if count < numel else 0
            state = view.optimizer.state.get(piece.param, {})
            each = [state[name].element_size() for name in view.cut_states(piece)]
            selecting += 2 * count * (unit.master_dtype.itemsize + sum(each))
        return Traffic(leaving, coming, leaving, plain, selecting)


def _anew(flow: ZenFlow) -> Progress:
    return Progress(Judge(flow.auto_ratio, flow.topk_ratio))
