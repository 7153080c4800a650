"""Learning-rate schedules as plain functions of the step, and the torch schedulers made of them.

Every function takes the number of the last finished step: -1 before the first, 0 after it. DeepSpeed's
schedules start there, which is why its warm-ups use their lowest value for the first two steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ds_core.state.shard import FlatShard, Json, SavedTensor

Warmup = Literal["log", "linear"]
PerGroup = float | Sequence[float]

_log = logging.getLogger(__name__)


def lr_range_test(
    step: int, min_lr: float, *, step_size: int = 2000, step_rate: float = 1.0, staircase: bool = False
) -> float:
    """A rate that grows without end, to find where training diverges (Smith, arXiv:1803.09820)."""
    interval = (step + 1) / step_size
    return min_lr * (1 + step_rate * (math.floor(interval) if staircase else interval))


def cycle_position(
    step: int, first: float, second: float, *, first_stairs: int = 0, second_stairs: int = 0
) -> float:
    """How far up the triangle of a cycle the step is: 0 at its feet, 1 at its top."""
    total, at = first + second, float(step + 1)
    x = at / total - math.floor(at / total)
    rising = x <= first / total
    stairs = first_stairs if rising else second_stairs
    if stairs <= 0:
        ratio = first / total
        return x / ratio if rising else (x - 1) / (ratio - 1)
    within = at % total
    climbed = within / first if within <= first else (total - within) / second
    return math.floor(climbed * stairs) / stairs


def warmup(step: int, num_steps: int, *, kind: Warmup = "log") -> float:
    """The share of a warm-up that is done, below 1 for the first `num_steps` (at least two) steps."""
    num_steps = max(2, num_steps)
    if step >= num_steps:
        return 1.0
    if step < 0:
        return 0.0
    return math.log(step + 1) / math.log(num_steps) if kind == "log" else step / num_steps


def warmup_decay(step: int, total_num_steps: int, num_steps: int, *, kind: Warmup = "log") -> float:
    """Warm-up, then a straight line that reaches 0 at `total_num_steps`."""
    num_steps = max(2, num_steps)
    if step < num_steps:
        return warmup(step, num_steps, kind=kind)
    return max(0.0, (total_num_steps - step) / max(1.0, total_num_steps - num_steps))


def warmup_cosine(
    step: int,
    total_num_steps: int,
    num_steps: int,
    *,
    kind: Warmup = "log",
    min_ratio: float = 0.0,
    cos_min_ratio: float = 1e-4,
) -> float:
    """The ratio to the optimizer's own rate: warm-up from `min_ratio`, then a half cosine to `cos_min_ratio`.

    Exactly 0 before the first step, whatever `min_ratio` says; it stays at the floor past the end.
    """
    num_steps = max(2, num_steps)
    if step < 0:
        return 0.0
    if step < num_steps:
        return min_ratio + (1 - min_ratio) * warmup(step, num_steps, kind=kind)
    progress = min(1.0, (step - num_steps + 1) / max(1, total_num_steps - num_steps))
    return max(0.0, cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


class Schedule(LRScheduler):
    """A torch scheduler whose whole state is one number; saves and loads as JSON."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)

    @property
    def last_batch_iteration(self) -> int:
        """DeepSpeed's counter: -1 until the first step."""
        return self.last_epoch - 1

    def rates(self, step: int) -> list[float]:
        """The rate of every parameter group after `step`."""
        raise NotImplementedError(f"{type(self).__name__} does not define rates()")

    def get_lr(self) -> list[float | Tensor]:
        """The rates at the present step; pure, unlike torch's own."""
        return list(self.rates(self.last_batch_iteration))

    def step(self, epoch: int | None = None) -> None:
        """Advance one step and write the rates into the optimizer; `epoch` jumps to that step instead."""
        if epoch is not None:
            self.last_epoch = epoch
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "last_batch_iteration": self.last_batch_iteration,
            "base_lrs": [float(lr) for lr in self.base_lrs],
        }

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """A schedule has no tensors: anything saved is an error."""
        return no_tensors(type(self).__name__, saved)

    def load_state_dict(self, state_dict: Mapping[str, Json]) -> None:
        """Continue at the saved step; the optimizer's rates are set again."""
        if "last_batch_iteration" not in state_dict:
            raise ValueError(
                f'{type(self).__name__} state needs "last_batch_iteration", got keys {sorted(state_dict)}'
            )
        self.base_lrs = list(state_dict.get("base_lrs", self.base_lrs))
        self.last_epoch = int(state_dict["last_batch_iteration"]) + 1
        self._step_count = self.last_epoch + 1  # torch's check that an optimizer step came first
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=False):
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


class LRRangeTest(Schedule):
    """`lr_range_test` for every group."""

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
    ) -> None:
        self._min = _per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self._size = _positive("lr_range_test_step_size", lr_range_test_step_size)
        self._rate, self._staircase = lr_range_test_step_rate, lr_range_test_staircase
        super().__init__(optimizer)

    def rates(self, step: int) -> list[float]:
        if step < 0:
            return list(self._min)
        size, rate, stairs = self._size, self._rate, self._staircase
        return [
            lr_range_test(step, low, step_size=size, step_rate=rate, staircase=stairs) for low in self._min
        ]


@dataclass(frozen=True, slots=True)
class CycleShape:
    """OneCycle's options by their DeepSpeed names."""

    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: PerGroup = 0.8
    cycle_max_mom: PerGroup = 0.9
    decay_mom_rate: float = 0.0

    def second(self) -> float:
        """Steps on the way down: as many as up unless given."""
        down = self.cycle_second_step_size
        return float(self.cycle_first_step_size if down is None else down)

    def position(self, step: int) -> float | None:
        """`cycle_position` inside the cycle, None after it."""
        first, second = float(self.cycle_first_step_size), self.second()
        if step >= first + second:
            return None
        up, down = self.cycle_first_stair_count, self.cycle_second_stair_count
        return cycle_position(
            step, first, second, first_stairs=up, second_stairs=up if down is None else down
        )

    def decay_interval(self, step: int) -> float:
        """How many decay steps have passed since the cycle ended; 0 when nothing decays."""
        past = step - (self.cycle_first_step_size + self.second()) + 1
        return past / self.decay_step_size if self.decay_step_size else 0.0


class OneCycle(Schedule):
    """One triangle up and down, then a slow decay; momentum runs the other way (Smith, arXiv:1803.09820).

    `shape` takes the fields of CycleShape. Momentum is the first of Adam's `betas`; while it is cycled the
    second is 0.99, as in DeepSpeed.
    """

    def __init__(
        self, optimizer: Optimizer, cycle_min_lr: PerGroup, cycle_max_lr: PerGroup, **shape: Any
    ) -> None:
        self._shape = CycleShape(**shape)
        _positive("cycle_first_step_size", self._shape.cycle_first_step_size)
        if self._shape.second() < 0:
            raise ValueError(f"cycle_second_step_size is {self._shape.second():.0f}; it must not be negative")
        self._low = _per_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self._high = _per_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self._moms: list[tuple[float, float]] | None = None
        if self._shape.cycle_momentum and "betas" not in optimizer.defaults:
            _log.warning("OneCycle: %s has no betas; its momentum is not cycled", type(optimizer).__name__)
        elif self._shape.cycle_momentum:
            lows = _per_group(optimizer, self._shape.cycle_min_mom, "cycle_min_mom")
            highs = _per_group(optimizer, self._shape.cycle_max_mom, "cycle_max_mom")
            self._moms = list(zip(lows, highs, strict=True))
        super().__init__(optimizer)

    def rates(self, step: int) -> list[float]:
        if step < 0:
            return list(self._low)
        up = self._shape.position(step)
        if up is None:
            fall = 1 + self._shape.decay_lr_rate * self._shape.decay_interval(step)
            return [low / fall for low in self._low]
        return [low + (high - low) * up for low, high in zip(self._low, self._high, strict=True)]

    def momenta(self, step: int) -> list[float] | None:
        """The momentum of every group after `step`; None when it is not cycled."""
        if self._moms is None:
            return None
        if step < 0:
            return [low for low, _ in self._moms]
        up = self._shape.position(step)
        if up is None:
            growth = 1 + self._shape.decay_mom_rate * self._shape.decay_interval(step)
            return [high * growth for _, high in self._moms]
        return [high - (high - low) * up for low, high in self._moms]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas that are set at the present step."""
        moms = self.momenta(self.last_batch_iteration)
        return None if moms is None else [(mom, 0.99) for mom in moms]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._write_betas()

    def load_state_dict(self, state_dict: Mapping[str, Json]) -> None:
        super().load_state_dict(state_dict)
        self._write_betas()

    def _write_betas(self) -> None:
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or (), strict=False):
            group["betas"] = betas


class WarmupLR(Schedule):
    """Warm up to `warmup_max_lr` (the optimizer's own rate if not given), then stay there."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
    ) -> None:
        own = [float(group["lr"]) for group in optimizer.param_groups]
        self._low = _per_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self._high = own if warmup_max_lr is None else _per_group(optimizer, warmup_max_lr, "warmup_max_lr")
        self._steps = max(2, _positive("warmup_num_steps", warmup_num_steps))
        self._kind = _warmup_kind(warmup_type)
        super().__init__(optimizer)

    def share(self, step: int) -> float:
        """Where between the lowest and the highest rate the step is."""
        return warmup(step, self._steps, kind=self._kind)

    def rates(self, step: int) -> list[float]:
        if step < 0:
            return list(self._low)
        return [
            low + (high - low) * self.share(step) for low, high in zip(self._low, self._high, strict=True)
        ]


class WarmupDecayLR(WarmupLR):
    """Warm up, then fall in a straight line to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 1e-3,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
    ) -> None:
        self._total = _total_steps(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)

    def share(self, step: int) -> float:
        return warmup_decay(step, self._total, self._steps, kind=self._kind)


class WarmupCosineLR(Schedule):
    """The optimizer's own rates times `warmup_cosine`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 1e-4,
        warmup_type: Warmup = "log",
    ) -> None:
        self._total = _total_steps(total_num_steps, warmup_num_steps)
        self._steps = _positive("warmup_num_steps", warmup_num_steps)
        self._options: dict[str, Any] = {
            "kind": _warmup_kind(warmup_type),
            "min_ratio": warmup_min_ratio,
            "cos_min_ratio": cos_min_ratio,
        }
        super().__init__(optimizer)

    def rates(self, step: int) -> list[float]:
        ratio = warmup_cosine(step, self._total, self._steps, **self._options)
        return [float(lr) * ratio for lr in self.base_lrs]


def _per_group(optimizer: Optimizer, value: PerGroup, name: str) -> list[float]:
    groups = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [float(value)] * groups  # type: ignore[arg-type]
    if len(value) != groups:
        raise ValueError(
            f"{name} has {len(value)} values for {groups} parameter groups; give one, or one per group"
        )
    return [float(one) for one in value]


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return value


def _warmup_kind(value: str) -> Warmup:
    if value == "log":
        return "log"
    if value == "linear":
        return "linear"
    raise ValueError(f'warmup_type is {value!r}; allowed: "log", "linear"')


def _total_steps(total: int, warmup_steps: int) -> int:
    if _positive("total_num_steps", total) < max(2, warmup_steps):
        _log.warning("total_num_steps %d is less than warmup_num_steps %d", total, warmup_steps)
    return total


def no_tensors(what: str, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
    """The answer of a part that has only JSON to load. Raises ValueError when the checkpoint has more."""
    if saved:
        raise ValueError(
            f"{what} keeps no tensors, but the checkpoint has {sorted(saved)}; is this its part?"
        )
    return {}
