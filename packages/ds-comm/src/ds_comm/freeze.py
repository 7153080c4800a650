"""When a warm-up ends: after a number of steps, or when the variance has come to rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class VarianceTest:
    """The warm-up ends when the variance's size has hardly changed for a while (Tang et al. 2021, section 7.1).

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
        """`sizes`: |v|_1 after each step, the last of which is now; older ones than the window may be gone."""
        window = self.steps(beta2)
        if len(sizes) <= window:
            return False
        low, high = sorted((sizes[-1 - window], sizes[-1]))
        return low > 0 and low >= self.threshold * high


def freeze_rule(freeze_step: int | Literal["auto"] | VarianceTest) -> int | VarianceTest:
    """Raises ValueError for what says nothing of when."""
    if freeze_step == "auto":
        return VarianceTest()
    if isinstance(freeze_step, VarianceTest):
        return freeze_step
    if isinstance(freeze_step, bool) or not isinstance(freeze_step, int) or freeze_step < 1:
        raise ValueError(
            f'freeze_step must be at least 1 step, "auto" or a VarianceTest, got {freeze_step!r}: the variance '
            "that is kept for good comes from the steps before it; the papers give them 15 to 20 % of all"
        )
    return freeze_step
