"""What is not selected: its gradients added up, and applied once an interval, here or beside the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_core.state.unit import FlatUnit
from ds_core.train.holdings import Piece
from ds_offload.home import Home
from ds_offload.policy import file_numel
from ds_offload.zen_later import (
    Due,
    Job,
    Measure,
    Passes,
    Stretch,
    add_up,
    apply,
    move,
    show,
    unmeasured,
)
from ds_offload.zen_now import Scaled, Selected
from ds_offload.zen_rule import Rule
from ds_offload.zen_state import SUMS
from ds_offload.zen_view import View, by_unit, gradient_of, stretch_of


@dataclass(slots=True)
class Flight:
    """An update under way: it reads homes and sums, and writes `targets`."""

    future: Future[dict[str, dict[str, Any]]]
    targets: dict[tuple[str, str], Home]
    versions: dict[str, int]  # of the masters' homes, when they were last put in order


class Rest:
    """Sums and their updates. `numbers`: the optimizer's states of no shape, such as its step, of the later
    updates, by parameter; those of the updates at every step are the ones in `optimizer.state`.
    """

    def __init__(self, view: View, selected: Selected, *, pinned: bool) -> None:
        self._view, self._selected = view, selected
        self._passes = Passes(view.store.policy, pinned=pinned)
        self._worker_passes = Passes(view.store.policy, pinned=pinned)
        self._pool: ThreadPoolExecutor | None = None
        self._beside: dict[tuple[str, str], Home] = {}  # targets, kept from flight to flight
        self._flight: Flight | None = None
        self.numbers: dict[str, dict[str, Any]] = {}

    @property
    def nbytes_beside(self) -> int:
        """Of the targets: masters and states once more, in the tiers where those live."""
        return sum(home.host_bytes + home.file_bytes for home in self._beside.values())

    # -- added up ------------------------------------------------------------------------------------------

    def add_up(self, pieces: Sequence[Piece], scaled: Scaled, measure: Measure) -> None:
        """These pieces' gradients join the sums. `measure` gets them, selected or not, in parts.

        Selected elements are added too, which is cheaper than to leave them out; nobody uses their sums.
        """
        counts = self._view.progress.counts
        for unit, members in by_unit([p for p in pieces if self._selected.rest(p)]).items():
            stretches = [(stretch_of(piece), piece.fqn not in counts) for piece in members]
            self._sum(unit, stretches, scaled, measure)
        for fqn, (unit, index) in self._view.slots().items():
            known = fqn in self._view.progress.selection
            if known and unit.gradient is not None and unit.has_grad[index]:
                counts[fqn] = counts.get(fqn, 0) + 1

    def _sum(
        self,
        unit: FlatUnit,
        stretches: Sequence[tuple[Stretch, bool]],
        scaled: Scaled,
        measure: Measure = unmeasured,
    ) -> None:
        home = self._view.store.home_of(f"{unit.key}/grad")
        assert unit.gradient is not None
        at_home = home is not None and unit.gradient.data_ptr() == home.tensor.data_ptr()
        gradient = home if home is not None and at_home else unit.gradient
        summed = self._view.states.home(unit, SUMS[self._view.progress.turn], unit.master_dtype)
        mine = partial(_in_dtype, scaled, unit.master_dtype)
        add_up(self._passes, gradient, summed, stretches, mine, measure)

    # -- applied here --------------------------------------------------------------------------------------

    def apply(self) -> set[str]:
        """What was added up, now, in place; returns whose masters changed at home."""
        progress = self._view.progress
        pieces, changed = self._due(progress.counts), set(progress.counts)
        for piece in pieces:
            self._selected.hold(piece)  # the pass goes over selected elements too, which are spoilt there
        jobs = self._jobs(pieces, progress.counts, progress.turn)
        self.numbers |= apply(self._passes, jobs, Rule(self._view.optimizer), {})
        progress.counts = {}
        return changed

    def apply_whole(self, pieces: Sequence[Piece], scaled: Scaled) -> None:
        """Parameters that came after the selection step as ever, with this step's gradient."""
        if self._flight is not None:
            self._flight.future.exception()  # both would wait for the same homes' writes
        for unit, members in by_unit(pieces).items():
            self._sum(unit, [(stretch_of(piece), True) for piece in members], scaled)
        jobs = self._jobs(pieces, {piece.fqn: 1 for piece in pieces}, self._view.progress.turn)
        after = apply(self._passes, jobs, Rule(self._view.optimizer), {})
        made = {job.key: job.homes.keys() - {"master"} for job in jobs}
        for piece in pieces:
            names = dict.fromkeys(made[piece.unit.key])
            self._view.states.show(piece, after[piece.fqn] | names)
        self.show({piece.fqn for piece in pieces})

    def _due(self, counts: Mapping[str, int]) -> list[Piece]:
        """Pieces with something to apply."""
        return [p for p in self._view.pieces() if p.fqn in counts and self._selected.rest(p)]

    def _jobs(self, pieces: Sequence[Piece], counts: Mapping[str, int], turn: int) -> list[Job]:
        view, group_of = self._view, self._view.group_of()
        jobs = []
        for unit, members in by_unit(pieces).items():
            stretches, names = [], dict[str, None]()
            for piece in members:
                cut = tuple(view.cut_states(piece))
                names.update(dict.fromkeys(cut))
                numbers = self.numbers.get(piece.fqn) or view.numbers(piece)
                low, high = piece.overlap.local
                group, count = group_of[id(piece.param)], counts[piece.fqn]
                stretches.append(Due(piece.fqn, low, high, group, count, cut, dict(numbers)))
            homes = {name: view.home(f"{unit.key}/{name}") for name in ("master", *names)}
            summed = view.home(f"{unit.key}/{SUMS[turn]}")
            new_state = partial(view.states.home, unit)
            jobs.append(Job(unit.key, unit.layout.shard_numel, homes, summed, stretches, new_state))
        return jobs

    def show(self, names: set[str]) -> None:
        """Masters of these parameters changed at home: into what the model sees, selected elements on top."""
        for unit, members in by_unit([p for p in self._view.pieces() if p.fqn in names]).items():
            if unit.separate_master:
                home = self._view.home(f"{unit.key}/master")
                show(self._passes, home, unit.local, [stretch_of(piece) for piece in members])
            for piece in members:
                self._selected.lay_over(piece)

    # -- applied beside the training -----------------------------------------------------------------------

    def launch(self) -> None:
        """Start to apply what was added up; the next interval is added up elsewhere."""
        progress = self._view.progress
        progress.flying, progress.counts = progress.counts, {}
        progress.turn ^= 1
        progress.rule = Rule(self._view.optimizer)
        self._fly()

    def _fly(self) -> None:
        progress = self._view.progress
        assert progress.rule is not None
        jobs = self._jobs(self._due(progress.flying), progress.flying, progress.turn ^ 1)
        targets = {
            (job.key, name): self._target(job.key, name, home)
            for job in jobs
            for name, home in job.homes.items()
        }
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="zenflow")
        future = self._pool.submit(apply, self._worker_passes, jobs, progress.rule, targets)
        self._flight = Flight(future, targets, self._versions())

    def _target(self, key: str, name: str, home: Home) -> Home:
        """Room beside a home, in the same tiers."""
        found = self._beside.get((key, name))
        if found is None or (found.numel, found.dtype) != (home.numel, home.dtype):
            store = self._view.store
            split = store.splits["master" if name == "master" else "moment"]
            on_disk = file_numel(home.numel, split)
            found = Home(home.numel, home.dtype, on_disk, store.volume, pinned=home.pinned)
            self._beside[key, name] = found
        return found

    def ready(self) -> dict[str, dict[str, Any]]:
        """Wait for the update under way. Raises what it raised; it starts again when it is next needed."""
        if self._flight is None:
            self._fly()
        assert self._flight is not None
        try:
            return self._flight.future.result()
        except BaseException:
            self._flight = None
            raise

    def land(self) -> set[str]:
        """What was applied beside the training goes home; returns whose masters changed there."""
        progress, after = self._view.progress, self.ready()
        assert self._flight is not None
        pieces, changed = self._due(progress.flying), set(progress.flying)
        for piece in pieces:
            self._selected.hold(piece)  # as in `apply`
        for unit, members in by_unit(pieces).items():
            stretches = [stretch_of(piece) for piece in members]
            for (key, name), source in self._flight.targets.items():
                if key == unit.key:
                    move(self._passes, source, self._view.home(f"{key}/{name}"), stretches)
        self.numbers |= after
        progress.flying, progress.rule, self._flight = {}, None, None
        return changed

    # -- looked at, and cut anew ---------------------------------------------------------------------------

    def note(self) -> None:
        """From here on writes to masters are others'."""
        if self._flight is not None:
            self._flight.versions = self._versions()

    def resume(self) -> None:
        """After a look: an update under way holds if nobody wrote the masters that it started from."""
        if self._flight is not None and self._flight.versions != self._versions():
            self.abandon()
        if self._view.progress.flying and self._flight is None:
            self._fly()

    def _versions(self) -> dict[str, int]:
        keys = {piece.unit.key for piece in self._view.pieces()}
        return {key: self._view.home(f"{key}/master").tensor._version for key in keys}

    def abandon(self) -> None:
        """What is under way comes to nothing."""
        if self._flight is not None:
            self._flight.future.exception()
            self._flight = None

    def close(self) -> None:
        """End the worker."""
        self.abandon()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def drop(self) -> None:
        """Units are others: nothing of this is of use."""
        self.abandon()
        self._beside = {}


def counted(pieces: Iterable[Piece]) -> list[Piece]:
    """Those with a gradient in this step."""
    return [piece for piece in pieces if gradient_of(piece) is not None]


def _in_dtype(scaled: Scaled, dtype: torch.dtype, values: Tensor) -> Tensor:
    return scaled(values, dtype)
