"""The unsharded twin: the same training in plain torch on one process, and how close is close enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_core.testing.models import Batch, Case, split


def assert_close_norm(
    actual: Tensor | Mapping[str, Tensor],
    expected: Tensor | Mapping[str, Tensor],
    rtol: float,
    *,
    name: str = "tensor",
) -> None:
    """Hold ||actual - expected|| / ||expected|| <= rtol for each tensor, computed in double precision.

    A tensor that should be zero must be zero to the bit; `rtol=0` asks for equality everywhere.
    Raises: AssertionError naming the tensors that are missing, of another shape, or too far off, worst first.
    """
    if isinstance(actual, Tensor) or isinstance(expected, Tensor):
        actual, expected = {name: actual}, {name: expected}  # type: ignore[dict-item]
    if actual.keys() != expected.keys():
        raise AssertionError(
            f"missing: {sorted(expected.keys() - actual.keys())}, "
            f"unexpected: {sorted(actual.keys() - expected.keys())}"
        )
    faults = [(relative_error(actual[key], expected[key]), key) for key in expected]
    # Written so that NaN counts as a fault.
    faults = sorted((f for f in faults if not f[0] <= rtol), key=lambda fault: -fault[0])
    if faults:
        lines = [f"  {key}: {error:.3e}" for error, key in faults[:8]]
        more = [f"  and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise AssertionError(
            "\n".join(
                [f"||d||/||ref|| > {rtol:g} in {len(faults)} of {len(expected)} tensors", *lines, *more]
            )
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in double precision; infinite where a zero or a shape differs."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    wanted = expected.detach().cpu().double()
    gap = float((actual.detach().cpu().double() - wanted).norm())
    size = float(wanted.norm())
    return gap / size if size else (0.0 if gap == 0 else float("inf"))


@dataclass(frozen=True)
class TwinStep:
    """What one optimizer step did. `grads` are the averaged, unscaled, unclipped gradients, by parameter.

    `sizes`: for each of them the mean norm of the parts that it is the sum of. Rounding errors scale with
    the parts, so where parts cancel the error may be large beside the sum, but never beside this.
    """

    loss: float
    grads: dict[str, Tensor]
    sizes: dict[str, float]
    grad_norm: float
    skipped: bool


class Twin:
    """Trains a case's model unsharded, on the batches that `ranks` ranks would see between them.

    Each rank's rows pass through the model by themselves, as they do on the rank, and gradients are averaged
    over ranks and micro batches as DDP does. With `dtype`, a copy of the model holds every floating parameter
    rounded to it (buffers keep theirs): forward and backward run on the copy, its gradients are widened and
    summed in fp32, and clipping and the optimizer work on the fp32 model. `loss_scale` multiplies the loss
    before backward and divides the sums; a step with a gradient that is not finite is skipped.
    With `zero_unused` a parameter without gradient gets zeros, as in flat shards; otherwise None, as in
    torch, whose AdamW then leaves out its weight decay too.
    """

    def __init__(
        self,
        case: Case,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        ranks: int = 1,
        dtype: torch.dtype | None = None,
        max_norm: float | None = None,
        loss_scale: float = 1.0,
        zero_unused: bool = True,
    ) -> None:
        self.case = case
        self.model = case.build()
        self.optimizer = make_optimizer(self.model)
        self.ranks = ranks
        self.max_norm = max_norm
        self.loss_scale = loss_scale
        self.zero_unused = zero_unused
        self._work = self.model if dtype is None else copy.deepcopy(self.model)
        for parameter in self._work.parameters() if dtype is not None else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def step(self, micro_batches: Sequence[Batch]) -> TwinStep:
        """One optimizer step over global micro batches, each of which is cut into `ranks` parts."""
        self._refresh()
        work = {fqn: p for fqn, p in self._work.named_parameters() if p.requires_grad}
        masters = dict(self.model.named_parameters())
        sums: dict[str, Tensor] = {}
        sizes: dict[str, float] = {}
        total, count = 0.0, len(micro_batches) * self.ranks
        for batch in micro_batches:
            for part in split(batch, self.ranks):
                loss = torch.stack(self.case.losses(self._work, part)).sum()
                (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
                for fqn, parameter in work.items():
                    if parameter.grad is not None:
                        wide = parameter.grad.to(masters[fqn].dtype)
                        sums[fqn] = sums[fqn] + wide if fqn in sums else wide.clone()
                        size = float(wide.double().norm()) / (count * self.loss_scale)
                        sizes[fqn] = sizes.get(fqn, 0.0) + size
                        parameter.grad = None
        grads = {fqn: grad / (count * self.loss_scale) for fqn, grad in sums.items()}
        if self.zero_unused:
            grads |= {fqn: torch.zeros_like(masters[fqn]) for fqn in work if fqn not in grads}
        norm = _norm(grads.values())
        skipped = not norm < float("inf")
        if not skipped:
            self._update(masters, grads, norm)
        return TwinStep(total / count, grads, sizes, norm, skipped)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, in full precision: copies."""
        return {fqn: p.detach().clone() for fqn, p in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `<fqn>/<state>`: copies."""
        found = {}
        for fqn, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{fqn}/{key}"] = value.detach().clone()
        return found

    def _refresh(self) -> None:
        """Round the masters into the working copy."""
        if self._work is not self.model:
            with torch.no_grad():
                for to, master in zip(self._work.parameters(), self.model.parameters(), strict=True):
                    to.copy_(master)

    def _update(self, masters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], norm: float) -> None:
        factor = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        for fqn, grad in grads.items():
            masters[fqn].grad = grad * factor
        self.optimizer.step()
        self.optimizer.zero_grad()


def _norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all tensors together."""
    norms = [t.double().norm() for t in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
