"""The rules: their numbers, checked, and what they do to fp32 lists, every product and sum on its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

Scales = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Hyper(ABC):
    """What a step needs besides tensors; a subclass is a rule.

    `code` and the bits of `flags` are those of kernels/optim/optim.h.
    """

    op: ClassVar[str]
    code: ClassVar[int] = -1
    states: ClassVar[tuple[str, ...]] = ()
    lr: float
    weight_decay: float = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self._within(name, not number or 0 <= value < math.inf, ">= 0 and finite")
            if name.startswith("beta"):
                self._within(name, value < 1, "in [0, 1)")

    def _within(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise ValueError(f"{self.op}: {name}={getattr(self, name)} is not allowed: it must be {allowed}")

    @classmethod
    def schema(cls) -> str:
        """The numbers as arguments of an op: "float lr, float eps, bool maximize"."""
        return ", ".join(f"{field.type} {field.name}" for field in fields(cls))

    @property
    def flags(self) -> int:
        """1: weight decay joins the gradient; 2: Nesterov's momentum."""
        return int(self.weight_decay != 0)

    def used(self) -> tuple[str, ...]:
        """The state lists that these numbers need."""
        return self.states

    @abstractmethod
    def constants(self) -> tuple[float, ...]:
        """What the native and Triton loops get for the whole call."""

    @abstractmethod
    def scales(self, step: int) -> Scales:
        """What they get for a tensor that makes its `step`-th step, in double until here."""


class Elementwise(Hyper):
    """A rule whose update of an element looks at that element alone."""

    @abstractmethod
    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: Sequence[int]
    ) -> None:
        """The rule itself, in place on fp32 lists; the gradients are lost."""

    def _decay_into(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        if self.flags & 1:
            torch._foreach_add_(grads, torch._foreach_mul(weights, self.weight_decay))


@dataclass(frozen=True, kw_only=True)
class AdamHyper(Elementwise):
    """`decoupled` is AdamW, else weight decay joins the gradient (L2)."""

    op = "adam_step_"
    code = 0
    states = ("exp_avgs", "exp_avg_sqs")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = True

    @property
    def flags(self) -> int:
        return int(not self.decoupled and self.weight_decay != 0)

    def constants(self) -> tuple[float, ...]:
        decay = 1.0 - self.lr * self.weight_decay if self.decoupled else self.weight_decay
        # Without weight decay the native loop multiplies by 1, which changes nothing.
        decay = decay if self.decoupled or self.flags else 1.0
        return 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps, decay

    def scales(self, step: int) -> Scales:
        return self.lr / (1.0 - self.beta1**step), (1.0 - self.beta2**step) ** -0.5

    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: Sequence[int]
    ) -> None:
        firsts, seconds = states
        if self.decoupled:
            torch._foreach_mul_(weights, 1.0 - self.lr * self.weight_decay)
        self._decay_into(weights, grads)
        change = torch._foreach_sub(grads, firsts)
        torch._foreach_mul_(change, 1.0 - self.beta1)
        torch._foreach_add_(firsts, change)
        torch._foreach_mul_(grads, grads)
        torch._foreach_mul_(grads, 1.0 - self.beta2)
        torch._foreach_mul_(seconds, self.beta2)
        torch._foreach_add_(seconds, grads)
        scales = [self.scales(step) for step in steps]
        denom = exact_sqrt(seconds)
        torch._foreach_mul_(denom, [scale[1] for scale in scales])
        torch._foreach_add_(denom, self.eps)
        ratio = torch._foreach_div(firsts, denom)
        torch._foreach_mul_(ratio, [scale[0] for scale in scales])
        torch._foreach_sub_(weights, ratio)


@dataclass(frozen=True, kw_only=True)
class AdagradHyper(Elementwise):
    """Duchi, Hazan and Singer 2011, with torch.optim.Adagrad's decay of the learning rate."""

    op = "adagrad_step_"
    code = 1
    states = ("sums",)
    lr_decay: float = 0.0
    eps: float = 1e-10

    def constants(self) -> tuple[float, ...]:
        return self.eps, self.weight_decay

    def scales(self, step: int) -> Scales:
        return self.lr / (1.0 + (step - 1) * self.lr_decay), 0.0

    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: Sequence[int]
    ) -> None:
        self._decay_into(weights, grads)
        torch._foreach_add_(states[0], torch._foreach_mul(grads, grads))
        denom = exact_sqrt(states[0])
        torch._foreach_add_(denom, self.eps)
        torch._foreach_div_(grads, denom)
        torch._foreach_mul_(grads, [self.scales(step)[0] for step in steps])
        torch._foreach_sub_(weights, grads)


@dataclass(frozen=True, kw_only=True)
class LionHyper(Elementwise):
    """Chen et al. 2023, program 1; weight decay apart from the gradient."""

    op = "lion_step_"
    code = 2
    states = ("exp_avgs",)
    beta1: float = 0.9
    beta2: float = 0.99

    @property
    def flags(self) -> int:
        return 0

    def constants(self) -> tuple[float, ...]:
        return 1.0 - self.beta1, 1.0 - self.beta2, 1.0 - self.lr * self.weight_decay, self.lr

    def scales(self, step: int) -> Scales:
        return 0.0, 0.0

    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: Sequence[int]
    ) -> None:
        change = torch._foreach_sub(grads, states[0])
        moved = torch._foreach_mul(change, 1.0 - self.beta1)
        ahead = [torch.sign(a + m) for a, m in zip(moved, states[0], strict=True)]
        torch._foreach_mul_(change, 1.0 - self.beta2)
        torch._foreach_add_(states[0], change)
        torch._foreach_mul_(weights, 1.0 - self.lr * self.weight_decay)
        torch._foreach_mul_(ahead, self.lr)
        torch._foreach_sub_(weights, ahead)


@dataclass(frozen=True, kw_only=True)
class SgdHyper(Elementwise):
    """torch.optim.SGD: with momentum the first gradient (step 1) enters the buffer undamped."""

    op = "sgd_step_"
    states = ("momentum_buffers",)
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"{self.op}: nesterov=True needs momentum > 0 and dampening=0; given "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )

    @property
    def code(self) -> int:  # type: ignore[override]
        return 4 if self.momentum else 3

    @property
    def flags(self) -> int:
        return int(self.weight_decay != 0) + 2 * int(self.nesterov)

    def used(self) -> tuple[str, ...]:
        return self.states if self.momentum else ()

    def constants(self) -> tuple[float, ...]:
        return self.weight_decay, self.lr, self.momentum

    def scales(self, step: int) -> Scales:
        return 1.0 if step == 1 else 1.0 - self.dampening, 0.0

    def update(
        self, weights: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: Sequence[int]
    ) -> None:
        self._decay_into(weights, grads)
        if self.momentum:
            torch._foreach_mul_(states[0], self.momentum)
            damped = torch._foreach_mul(grads, [self.scales(step)[0] for step in steps])
            torch._foreach_add_(states[0], damped)
            ahead = torch._foreach_mul(states[0], self.momentum) if self.nesterov else ()
            grads = list(torch._foreach_add(grads, ahead) if self.nesterov else states[0])
        torch._foreach_sub_(weights, torch._foreach_mul(grads, self.lr))


@dataclass(frozen=True, kw_only=True)
class LambHyper(Hyper):
    """You et al. 2020, algorithm 2, with the trust ratio held within [min_coeff, max_coeff]."""

    op = "lamb_step_"
    states = ("exp_avgs", "exp_avg_sqs")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    min_coeff: float = 0.01
    max_coeff: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("max_coeff", self.max_coeff >= self.min_coeff, f">= min_coeff={self.min_coeff}")

    def constants(self) -> tuple[float, ...]:
        return 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps, self.weight_decay

    def scales(self, step: int) -> Scales:
        return 1.0 / (1.0 - self.beta1**step), (1.0 - self.beta2**step) ** -0.5


def exact_sqrt(values: list[Tensor]) -> list[Tensor]:
    """The IEEE square root. torch's own on the CPU is an ulp off in a fifth of all cases (MKL)."""
    return [x.double().sqrt_().float() if x.device.type == "cpu" else x.sqrt() for x in values]
