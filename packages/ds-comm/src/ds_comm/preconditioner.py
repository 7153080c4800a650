"""Momenta in units of their variance's root, to the nearest power of two below: signs then fit all alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_core.ground.wire import Communicator

_DEAD = -128  # the exponent of an element whose variance is 0, and of padding
# Of a momentum, in those units: the root is 1 to 2 of them, and Adam's own m / sqrt(v) is 3.2 at most at its
# usual betas. An element whose gradients come back after its variance was taken would set its block's size.
_MOST = 8.0


class Exponents:
    """k of every element, 2^k near the root of its variance: [numel] int8, the same on every rank.

    Multiplying by powers of two rounds nothing, so errors stay in the gradients' own units: what is divided
    and multiplied again is what it was. Where there never was a gradient both ways give 0.
    """

    def __init__(self, exponents: Tensor) -> None:
        self._exponents = exponents

    @classmethod
    def gather(
        cls, parts: Sequence[tuple[slice, Tensor]], numel: int, comm: Communicator | None, about: str
    ) -> Exponents:
        """From the variances of this rank's parts: of its shard of [numel], or of all of it without `comm`.

        Collective with `comm`: one byte for each element.
        """
        world = 1 if comm is None else comm.world
        device = parts[0][1].device if parts else torch.device("cpu")
        mine = torch.full((numel // world,), _DEAD, dtype=torch.int8)
        if comm is not None:
            mine = comm.allocate(numel // world, torch.int8).fill_(_DEAD)
        elif parts:
            mine = mine.to(device)
        for where, variance in parts:
            twice = torch.frexp(variance.view(-1).float()).exponent
            k = twice.div(2, rounding_mode="floor").clamp_(-120, 120)
            mine[where] = torch.where(variance.view(-1) > 0, k, _DEAD).to(torch.int8)
        if comm is None:
            return cls(mine)
        whole = comm.allocate(numel, torch.int8)
        comm.all_gather(whole, mine, about=f"sizes of variances of {about}").wait()
        return cls(whole)

    def shrink_(self, momentum: Tensor) -> Tensor:
        """momentum [numel] in these units, at most 8 of them; what is not finite becomes NaN."""
        spoilt = torch.isinf(self.divide_(momentum))
        return momentum.clamp_(-_MOST, _MOST).masked_fill_(spoilt, float("nan"))

    def divide_(self, value: Tensor, begin: int = 0) -> Tensor:
        """value * 2^-k, of the elements from `begin` on."""
        return self._times(value, begin, -1)

    def multiply_(self, value: Tensor, begin: int = 0) -> Tensor:
        """value * 2^k, of the elements from `begin` on."""
        return self._times(value, begin, 1)

    def _times(self, value: Tensor, begin: int, sign: int) -> Tensor:
        k = self._exponents[begin : begin + value.numel()]
        power = (k.to(torch.int32) * sign + 127).clamp_(1, 254).bitwise_left_shift_(23).view(torch.float32)
        return value.mul_(power.masked_fill_(k == _DEAD, 0.0))
