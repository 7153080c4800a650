"""Loss scaling for fp16: static, and dynamic as in mixed precision training (Micikevicius et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ds_core.state.shard import FlatShard, Json, Saveable, SavedTensor


class LossScaler(Saveable, Protocol):
    """What the engine asks of a scaler."""

    @property
    def value(self) -> float: ...
    def scale(self, loss: Tensor) -> Tensor: ...
    def update(self, *, overflow: bool) -> None: ...


class _JsonState:
    """A part of a checkpoint that has numbers only."""

    _fields: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        return {name: getattr(self, name) for name in self._fields}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        if saved:
            raise ValueError(f"{type(self).__name__} holds no tensors, the checkpoint has {sorted(saved)}")
        return {}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        for name in self._fields:
            setattr(self, name, values[name])


class StaticScale(_JsonState):
    """A fixed factor. An overflow still skips the step."""

    _fields = ("value",)

    def __init__(self, value: float = 1.0) -> None:
        if value <= 0:
            raise ValueError(f"the loss scale must be above 0, got {value}")
        self.value = float(value)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def update(self, *, overflow: bool) -> None:
        """Nothing to adapt."""


class DynamicScale(_JsonState):
    """Halves on overflow once `hysteresis` overflows were seen, doubles after `window` clean steps.

    DeepSpeed's rule and defaults: hysteresis refills only when the scale grows, unless
    `consecutive_hysteresis` refills it on every clean step. Raises FloatingPointError when an overflow comes
    at the minimum, since training can then only stand still.
    """

    _fields = ("value", "clean_steps", "patience")

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        window: int = 1000,
        hysteresis: int = 2,
        minimum: float = 1.0,
        consecutive_hysteresis: bool = False,
    ) -> None:
        if initial < minimum or minimum <= 0:
            raise ValueError(f"need 0 < minimum <= initial, got minimum={minimum}, initial={initial}")
        if window < 1 or hysteresis < 1:
            raise ValueError(f"window and hysteresis must be at least 1, got {window} and {hysteresis}")
        self.value = float(initial)
        self.window, self.hysteresis, self.minimum = window, hysteresis, float(minimum)
        self.consecutive_hysteresis = consecutive_hysteresis
        self.clean_steps = 0
        self.patience = hysteresis

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def update(self, *, overflow: bool) -> None:
        """After each step: did any gradient overflow on any rank?"""
        if not overflow:
            self.clean_steps += 1
            if self.consecutive_hysteresis:
                self.patience = self.hysteresis
            if self.clean_steps % self.window == 0:
                self.patience = self.hysteresis
                self.value *= 2.0
            return
        self.clean_steps = 0
        if self.patience > 1:
            self.patience -= 1
            return
        if self.value <= self.minimum:
            raise FloatingPointError(
                f"gradients overflow at the smallest loss scale, {self.minimum:g}: the loss itself is not "
                "finite or far too large; use bfloat16, lower the learning rate, or look at the batch"
            )
        self.value = max(self.value / 2.0, self.minimum)
