"""What the micro batches of a step add up to: their losses, their tokens, and how much each one weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_UNIT = 1024.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all micro batches of all ranks. `tokens` None: nobody counted any."""

    loss: float
    tokens: int | None
    factor: float  # what the summed gradient still has to be multiplied by


class Tally:
    """Collects the losses of one step.

    A backward that keeps its graph is followed by another one of the same micro batch: their losses add up.
    Without token counts the step's gradient is the mean of the micro batches' gradients over micro batches
    and ranks. With them it is the mean over all tokens of the step,
    sum(tokens_i * grad_i) / sum(tokens_i), where loss i is a mean over its own tokens_i.

    [Note: tokens are counted at the end] The total is known only when the last rank has run its last micro
    batch, and gradients are linear: each backward is weighted by tokens_i / unit, and the step multiplies the
    sum by ranks * unit / total. `unit` is a power of two near the tokens of a micro batch of the step before,
    so that losses keep their size (fp16 gradients would overflow) and the division costs no rounding.
    """

    def __init__(self) -> None:
        self.unit = TOKENS_PER_UNIT
        self.clear()

    def clear(self) -> None:
        """A new step begins."""
        self.losses: list[Tensor] = []
        self._weights: list[float | Tensor] = []  # tokens, one for each loss; none where nobody counts
        self._tokens: list[float | Tensor] = []  # of the micro batches that are complete
        self._micros = 0
        self._retained = self._stepped = False

    def weight(self, tokens: float | Tensor | None, accumulate: int) -> float | Tensor:
        """What the next loss is multiplied by before its backward. Raises ValueError for a mixture."""
        if self.losses and (tokens is not None) != bool(self._weights):
            given = "tokens" if self._weights else "no tokens"
            raise ValueError(
                f"the first backward of this step was given {given}: give tokens to all, or none"
            )
        if tokens is None:
            return 1.0 / accumulate
        if not isinstance(tokens, Tensor) and tokens < 0:
            raise ValueError(f"tokens must be 0 or more, got {tokens}")
        return tokens / self.unit

    def add(self, loss: Tensor, tokens: float | Tensor | None, *, retained: bool) -> None:
        """A backward of this loss has run; `retained` says that the micro batch has another loss."""
        self.losses.append(loss.detach().reshape(()))
        if tokens is not None:
            self._weights.append(tokens.detach().reshape(()) if isinstance(tokens, Tensor) else tokens)
        self._retained, self._stepped = retained, False
        if not retained:
            self._end_micro()

    def _end_micro(self) -> None:
        self._micros += 1
        self._tokens += self._weights[-1:]
        self._retained = False

    def end_micro(self) -> None:
        """`step` was called. Raises RuntimeError when no backward came since the call before."""
        if not self.losses or self._stepped:
            raise RuntimeError("step() without a backward: call engine.backward(loss) first")
        self._stepped = True
        if self._retained:
            self._end_micro()

    def sums(self, device: torch.device) -> Tensor:
        """This rank's part of the totals, to be summed over ranks: [5] float64."""
        losses = torch.stack(self.losses).to(device, torch.float64)
        if self._weights:
            weights = _stack(self._weights, device)
            losses = torch.where(weights > 0, losses * weights, 0.0)  # a mean over no token is NaN
        tokens = _stack(self._tokens or [0.0], device)
        counts = [self._micros, self._micros if self._weights else 0, 1]
        rest = torch.tensor(counts, dtype=torch.float64, device=device)
        return torch.cat([losses.sum().view(1), tokens.sum().view(1), rest])

    def totals(self, summed: Sequence[float]) -> Totals:
        """The totals from what `sums` came to over all ranks.

        Raises RuntimeError when only some ranks counted tokens, ValueError when there was no token at all.
        """
        loss, tokens, micros, weighted, ranks = summed
        if weighted == 0:
            return Totals(loss / micros, None, 1.0)
        if weighted != micros:
            raise RuntimeError(
                f"{weighted:.0f} of this step's {micros:.0f} micro batches over all ranks were given tokens: "
                "give them on every rank, or on none"
            )
        if tokens == 0:
            raise ValueError("this step has no token on any rank, so its mean is not defined: skip the batch")
        factor = ranks * self.unit / tokens
        self.unit = 2.0 ** round(math.log2(tokens / micros))
        return Totals(loss / tokens, int(tokens), factor)


def _stack(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
