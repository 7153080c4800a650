"""How long a run is, and the learning rate at each of its steps."""

from __future__ import annotations

import math
from statistics import median

from ds_zero.recipes.flags import MAX_AUTO_STEPS
from ds_zero.recipes.ranks import Ranks

SETTLE_AFTER = 16  # steps of a phase that are timed before the length is chosen
_MIN_AUTO_STEPS = 40
_MAX_WARMUP = 30
_FLOOR = 0.05
_MUCH_SLOWER = 0.9  # a later phase shortens the run if it leaves less than this share of the steps


class Pace:
    """Total steps and learning-rate factor.

    Without a given total, the first steps are timed and decide it; they lie within the warmup, whose factor
    does not depend on the total. A later phase that turns out to be much slower shortens the run.
    """

    def __init__(self, total: int | None, warmup: int | None, minutes: float) -> None:
        self.total = total
        self.warmup = warmup if warmup is not None else self._default_warmup(total)
        self._choose_total = total is None
        self._choose_warmup = total is None and warmup is None
        self._left_s = 60 * minutes
        self._seconds: list[float] = []

    @staticmethod
    def _default_warmup(total: int | None) -> int:
        return _MAX_WARMUP if total is None else min(_MAX_WARMUP, total // 4)

    def factor(self, step: int) -> float:
        """Share of the peak rate at `step` (0 is the first): linear warmup, then cosine to a twentieth."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.total is None:
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done))

    def new_phase(self) -> None:
        """Speed may be another from here on."""
        self._seconds = []

    def observe(self, step: int, seconds: float, ranks: Ranks) -> bool:
        """Take the time of one step, the `step`-th to be done; True when it changed the total.

        Collective on the step that decides.
        """
        if not self._choose_total:
            return False
        self._left_s -= seconds
        self._seconds.append(seconds)
        if len(self._seconds) != SETTLE_AFTER:
            return False
        # The first steps warm caches and allocators.
        each, left = (value / ranks.world for value in ranks.sum(median(self._seconds[2:]), self._left_s))
        fits = step + max(0, int(left / each))
        if self.total is None:
            self.total = max(_MIN_AUTO_STEPS, min(MAX_AUTO_STEPS, fits))
            if self._choose_warmup:
                self.warmup = max(SETTLE_AFTER + 1, self._default_warmup(self.total))
            return True
        if fits < _MUCH_SLOWER * self.total:
            self.total = max(step + 1, fits)
            return True
        return False
