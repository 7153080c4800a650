"""One stretch of training at one world size and stage: load, train, measure, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_core import CheckpointStore
from ds_zero.recipes.build import Job, Split, build_job
from ds_zero.recipes.evaluate import bits, heldout_nats
from ds_zero.recipes.flags import Settings, write_run
from ds_zero.recipes.measure import Setting, beside, state_formulas, storage_bytes, wire_formula
from ds_zero.recipes.model import GPTConfig
from ds_zero.recipes.pace import Pace
from ds_zero.recipes.prepare import Text
from ds_zero.recipes.progress import Progress
from ds_zero.recipes.ranks import Ranks
from ds_zero.recipes.record import Measured, Phase, Record

CHECKPOINTS = "checkpoints"
_MEASURED_STEP = 3  # of a phase: gathers, moments and buckets are in their steady state by then


@dataclass(slots=True)
class Run:
    """What all phases of one command share."""

    settings: Settings
    directory: Path
    ranks: Ranks
    text: Text
    config: GPTConfig
    numel: int
    pace: Pace
    progress: Progress
    record: Record


class PhaseRunner:
    """Trains `run` from where it stands to `end(total steps)`."""

    def __init__(
        self, run: Run, split: Split, stage: int, *, resume: bool, end: Callable[[int], int]
    ) -> None:
        self.run, self.split, self.stage, self._end = run, split, stage, end
        self.job: Job = build_job(
            run.settings, run.config, run.text.windows, run.pace, run.ranks, split, stage
        )
        self.store = CheckpointStore(run.directory / CHECKPOINTS, keep=run.settings.keep or None)
        self.step = 0
        heldout_saved = self._load() if resume else None
        self.phase = Phase(
            ranks=split.world,
            stage=stage,
            dtype=run.settings.dtype,
            batch=split.batch,
            accumulate=split.accumulate,
            first_step=self.step,
            last_step=self.step,
        )
        run.record.phases.append(self.phase)
        self.label = f"stage {stage} on {split.world} rank(s)"
        run.progress.say(
            f"{self.label}, {split.batch} x {split.accumulate} sequences per rank, {self.job.optimizer_name}"
        )
        if heldout_saved is not None:
            self._compare(heldout_saved)

    def _load(self) -> float | None:
        """Continue from the newest checkpoint; returns the held-out loss that it was saved with."""
        user = self.store.load(self.job.parts)
        self.step = int(user["step"])
        self.run.record = Record.from_json(user["record"])
        heldout: float | None = user["heldout"]
        return heldout

    def _compare(self, saved: float) -> None:
        self.phase.heldout_in_checkpoint = saved
        self.phase.heldout_at_load = self._evaluate()
        self.run.progress.say(
            f"resumed at step {self.step}: held-out {bits(saved):.6f} bits per byte in the checkpoint, "
            f"{bits(self.phase.heldout_at_load):.6f} now"
        )

    def _evaluate(self) -> float:
        return heldout_nats(self.job.model, self.run.text.heldout, self.run.ranks)

    # -- training ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Step to the end of the phase, saving in the background on the way, then measure and save.

        Collective. Raises ValueError when there is nothing left to train.
        """
        run = self.run
        if self._done():
            raise ValueError(f"the run has done {self.step} steps already: give more --steps to go on")
        run.pace.new_phase()
        batches = self.job.batches(run.ranks.accelerator.device)
        while not self._done():
            began = time.perf_counter()
            loss = self._one_step(batches, measure=self._measures_now())
            seconds = time.perf_counter() - began
            self._note(loss, seconds)
            if run.pace.observe(self.step, seconds, run.ranks) and run.ranks.leads:
                write_run(run.directory, run.settings, self.split.global_batch, run.pace)
            if self._saves_now():
                self._save(heldout=None)
        self.phase.heldout_at_save = self._evaluate()
        self._save(heldout=self.phase.heldout_at_save)
        self.store.close()
        run.progress.say(
            f"step {self.step} saved: held-out {bits(self.phase.heldout_at_save):.6f} bits per byte"
        )

    def _done(self) -> bool:
        total, stop = self.run.pace.total, self.run.settings.stop_after
        if total is None:  # not chosen yet
            return stop is not None and self.step >= stop
        return self.step >= self._end(total)

    def _one_step(self, batches: Any, *, measure: bool) -> float:
        engine, peak, report = self.job.engine, dict[str, int](), None
        while report is None:
            ids_BT, targets_BT = next(batches)
            engine.backward(engine(ids_BT, targets_BT))
            if measure:
                if engine.at_boundary:
                    self.job.owner.drain()
                now = self._state_bytes()
                peak = {name: max(size, peak.get(name, 0)) for name, size in now.items()}
            report = engine.step()
        self.step += 1
        if measure:
            self._fill_tables(peak, sum(report.bytes_on_wire.values()))
        return float(report.loss)

    def _note(self, loss: float, seconds: float) -> None:
        tokens = self.split.global_batch * self.run.config.seq
        self.phase.last_step = self.step
        self.phase.seconds += seconds
        self.phase.tokens += tokens
        self.run.record.losses.append((self.step, loss))
        self.run.progress.step(self.step, self.run.pace.total, loss, tokens / seconds, self.label)

    # -- measuring -----------------------------------------------------------------------------------------

    def _measures_now(self) -> bool:
        total = self.run.pace.total
        wanted = self.phase.first_step + _MEASURED_STEP
        return self.step == (wanted if total is None else min(wanted, self._end(total) - 1))

    def _state_bytes(self) -> dict[str, int]:
        """From live storages; a storage counts once, under the first of the three that holds it."""
        owner, seen = self.job.owner, set[int]()
        states = self.job.optimizer.optimizer.state.values()
        masters = [unit.master().tensor for unit in owner.trainable]
        moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
        return {
            "parameters": storage_bytes((t for unit in owner.units for t in (unit.whole, unit.local)), seen),
            "gradients": storage_bytes(owner.reducer.live(), seen),
            "optimizer state": storage_bytes([*masters, *moments], seen),
        }

    def _num_states(self) -> int:
        """How many numbers the optimizer keeps for each element of a parameter."""
        for param, state in self.job.optimizer.optimizer.state.items():
            return sum(1 for t in state.values() if isinstance(t, torch.Tensor) and t.shape == param.shape)
        return 0

    def _fill_tables(self, state: dict[str, int], sent: int) -> None:
        settings = self.run.settings
        setting = Setting(
            self.run.numel,
            self.split.world,
            self.stage,
            self.split.accumulate,
            settings.dtype,
            self._num_states(),
        )
        self.phase.bytes_per_rank = beside(state, state_formulas(setting))
        self.phase.sent_per_step = {"all collectives": Measured(sent, *wire_formula(setting))}

    # -- saving --------------------------------------------------------------------------------------------

    def _saves_now(self) -> bool:
        total, every = self.run.pace.total, self.run.settings.save_every
        if every is None:
            every = 0 if total is None else max(1, total // 4)
        return every > 0 and self.step % every == 0 and not self._done()

    def _save(self, heldout: float | None) -> None:
        """Save in the background; training goes on meanwhile. Collective."""
        user = {"step": self.step, "heldout": heldout, "record": self.run.record.as_json()}
        self.store.save(self.step, self.job.parts, user=user, block=False)
