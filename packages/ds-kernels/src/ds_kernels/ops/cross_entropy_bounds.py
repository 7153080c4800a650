"""How far from their references the cross-entropy ops may be, from the arithmetic; everything in double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_kernels.rounding import UNIT, once


def far_lse(x: Tensor) -> Tensor:
    """How far two log-sum-exps of rows, computed in fp32, may part.

    A sum of n positive terms is off by at most (n - 1) units of itself, each exponential by 2 ulp = 4 units
    and by the rounding of its argument, a unit of at most the span of the row; the logarithm makes an
    absolute error of it, and rounds, and so does the sum with the largest logit.
    """
    span = (x.amax(1, keepdim=True) - x).masked_fill(x.isinf(), 0).amax(1).clamp(max=104)
    ends = x.amax(1).abs() + torch.logsumexp(x, 1).abs() + x.shape[1]
    far: Tensor = 2 * UNIT * (x.shape[1] + 8 + span + 2 * ends)
    return far


def far_losses(x: Tensor, settings: dict[str, Any]) -> Tensor:
    """How far two losses of rows may part: the errors of their terms, and 4 roundings of sums of these."""
    lse, smoothing, z_loss = torch.logsumexp(x, 1), settings["label_smoothing"], settings["z_loss"]
    terms = lse.abs() + x.abs().amax(1) + z_loss * lse.square()
    mean = smoothing * (x.shape[1] + 4) * x.abs().mean(1)
    far: Tensor = far_lse(x) * (1 + 2 * z_loss * lse.abs()) + 2 * UNIT * (mean + 4 * terms)
    return far


def far_gradient(
    x: Tensor, target: Tensor, scale: Tensor, settings: dict[str, Any], far: Tensor | float
) -> Tensor:
    """How far two gradients of rows may part, before they are rounded to a dtype.

    The exponential of x - lse: the rounding of its argument, 2 ulp, and what lse is `far` by; then the
    product with 1 + 2 z lse and the sums, no larger than their terms.
    """
    lse, smoothing, z_loss = torch.logsumexp(x, 1), settings["label_smoothing"], settings["z_loss"]
    p, weight = (x - lse[:, None]).exp(), (1 + 2 * z_loss * lse.abs())[:, None]
    rounded = 2 * UNIT * p * weight * ((x - lse[:, None]).abs().nan_to_num(0, 0, 0) + 12)
    moved = p * (weight + 2 * z_loss) * torch.as_tensor(far).reshape(-1, 1)
    hot = torch.zeros_like(p).scatter_(1, target.clamp(0, x.shape[1] - 1)[:, None], 1.0)
    kept = 8 * UNIT * (smoothing / x.shape[1] + hot)
    apart: Tensor = scale.double().abs()[:, None] * (rounded + moved + kept) + 2.0**-148
    return apart


def bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of ds::cross_entropy: losses, log-sum-exps."""
    x = args[0].double()
    return [far_losses(x, kwargs), far_lse(x)]


def backward_bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of ds::cross_entropy_backward: the gradient."""
    dlosses, logits, target, lse = args
    far = (torch.logsumexp(logits.double(), 1) - lse.double()).abs()  # what was given, whatever it is
    apart = far_gradient(logits.double(), target, dlosses, kwargs, far)
    return [apart + once(wanted[0], logits.dtype)]


def in_place_bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of ds::cross_entropy_: losses, the gradient."""
    logits, target, scale = args
    x = logits.double()
    far = far_gradient(x, target, scale, kwargs, far_lse(x))
    return [far_losses(x, kwargs), far + once(wanted[1], logits.dtype)]
