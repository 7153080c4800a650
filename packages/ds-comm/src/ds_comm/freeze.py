"""When a warm-up ends: after a number of steps, or when the variance has come to rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json
from ds_core.train.optim import attached


@dataclass(frozen=True, slots=True)
class VarianceTest:
    """The warm-up ends when the variance's size hardly changes any more (Tang et al. 2021, section 7.1).

    |v|_1 of the whole model now and `window` steps ago, each corrected for its bias: the smaller over the
    larger must be at least `threshold`. `window` None is 1 / (1 - beta2), what the variance remembers.
    `at_least`: not before so many steps, such as those of the learning rate's own warm-up.
    """

    threshold: float = 0.96
    window: int | None = None
    at_least: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 step, got {self.window}")
        if self.at_least < 0:
            raise ValueError(f"at_least must be 0 steps or more, got {self.at_least}")

    def steps(self, beta2: float) -> int:
        """Of the window."""
        return self.window or max(1, round(1.0 / (1.0 - beta2)))

    def has_come_to_rest(self, sizes: list[float], beta2: float) -> bool:
        """`sizes`: |v|_1 after each step, the last one now; older ones than the window may be gone."""
        window = self.steps(beta2)
        if len(sizes) <= window:
            return False
        low, high = sorted((sizes[-1 - window], sizes[-1]))
        return low > 0 and low >= self.threshold * high


class WarmUp:
    """Counts the steps of an optimizer until its warm-up is over."""

    def __init__(self, freeze_step: int | Literal["auto"] | VarianceTest) -> None:
        self.rule = freeze_rule(freeze_step)
        self.steps = 0
        self.over = False
        self._sizes: list[float] = []  # |v|_1 of the steps that the variance test looks back on

    def ends(self, optimizer: Optimizer, owner: FlatOwner) -> bool:
        """A step is done: does the warm-up end with it? The same on every rank. Collective with a test."""
        self.steps += 1
        if self.over:
            return False
        self.over = self.steps >= self.rule if isinstance(self.rule, int) else self._rests(optimizer, owner)
        return self.over

    def _rests(self, optimizer: Optimizer, owner: FlatOwner) -> bool:
        assert isinstance(self.rule, VarianceTest)
        beta2 = min(float(group["betas"][1]) for group in optimizer.param_groups)
        size = torch.zeros(1, dtype=torch.float64)
        for piece in attached(optimizer).held.trained:
            if state := optimizer.state.get(piece.param):
                size += state["exp_avg_sq"].sum(dtype=torch.float64).cpu()
        owner.control.all_reduce(size, about="the variance's size").wait()  # at stage 0 world times the same
        self._sizes.append(float(size) / (1.0 - beta2**self.steps))
        del self._sizes[: -1 - self.rule.steps(beta2)]
        return self.steps >= self.rule.at_least and self.rule.has_come_to_rest(self._sizes, beta2)

    def counters(self) -> dict[str, Json]:
        return {"steps": self.steps, "frozen": self.over, "sizes": [] if self.over else list(self._sizes)}

    def load_counters(self, values: Json) -> None:
        """None, of another optimizer's checkpoint, begins anew."""
        found = values or {}
        self.steps, self.over = int(found.get("steps", 0)), bool(found.get("frozen", False))
        self._sizes = [float(size) for size in found.get("sizes", [])]


def freeze_rule(freeze_step: int | Literal["auto"] | VarianceTest) -> int | VarianceTest:
    """Raises ValueError for what says nothing of when."""
    if freeze_step == "auto":
        return VarianceTest()
    if isinstance(freeze_step, VarianceTest):
        return freeze_step
    if isinstance(freeze_step, bool) or not isinstance(freeze_step, int) or freeze_step < 1:
        raise ValueError(
            f'freeze_step must be at least 1 step, "auto" or a VarianceTest, got {freeze_step!r}: the '
            "variance that is kept for good comes from the steps before it, 15 to 20 % of all in the papers"
        )
    return freeze_step
