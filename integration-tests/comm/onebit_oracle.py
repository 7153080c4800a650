"""1-bit optimizers as their papers have them: plain torch, all workers in one process, nothing sharded.

What is shared with the real thing are facts, not code: where parameters sit in a unit, and how many ranks cut it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ds_core.state.unit import FlatUnit
from ds_core.testing.models import Case


def pack(value: Tensor, error: Tensor, block: int | None, norm: str = "l1") -> tuple[Tensor, Tensor]:
    """What one row [n] looks like on the other side, and what is lost."""
    total = value + error
    seen = torch.empty_like(total)
    for part in range(0, total.numel(), block or total.numel()):
        here = total[part : part + (block or total.numel())]
        wide = here.double()
        scale = wide.abs().mean() if norm == "l1" else wide.square().mean().sqrt()
        seen[part : part + here.numel()] = torch.where(here < 0, -scale.float(), scale.float())
    return seen, total - seen


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum, first one first."""
    found = parts[0].clone()
    for part in parts[1:]:
        found += part
    return found


@dataclass
class FlatOracle:
    """One unit [numel] of the real run, padding included, on `world` virtual workers."""

    slots: list[tuple[str, torch.Size, int, int]]
    numel: int  # of the real unit
    dtype: torch.dtype
    world: int
    values: Tensor  # [numel] fp32: the masters
    block: int | None = 2048
    norm: str = "l1"
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    worker: list[Tensor] = field(init=False)  # errors, [padded] each
    server: Tensor = field(init=False)  # [padded]: every chunk's, in a row

    def __post_init__(self) -> None:
        self.each = math.ceil(self.numel / (8 * self.world)) * 8
        self.padded = self.each * self.world
        self.used = torch.zeros(self.padded, dtype=torch.bool)
        for _, _, start, end in self.slots:
            self.used[start:end] = True
        self.m, self.v = torch.zeros(self.padded), torch.zeros(self.padded)
        self.values = torch.nn.functional.pad(self.values, (0, self.padded - self.numel))
        self.worker = [torch.zeros(self.padded) for _ in range(self.world)]
        self.server = torch.zeros(self.padded)

    def mean_of_signs(self, sent: Sequence[Tensor]) -> Tensor:
        """Two hops over what every worker has to send, [padded] each, with both errors."""
        mean = torch.zeros(self.padded)
        for rank in range(self.world):
            for row in range(self.world):
                here = slice(row * self.each, (row + 1) * self.each)
                seen, lost = pack(sent[rank][here], self.worker[rank][here], self.block, self.norm)
                mean[here] += seen
                self.worker[rank][here] = lost
            self.worker[rank][~self.used] = 0
        mean *= torch.tensor(1.0 / self.world, dtype=torch.float32)
        out = torch.empty(self.padded)
        for row in range(self.world):
            here = slice(row * self.each, (row + 1) * self.each)
            out[here], self.server[here] = pack(mean[here], self.server[here], self.block, self.norm)
        self.server[~self.used] = 0
        return out


class Oracle:
    """Trains a case as `world` workers with equal weights; subclasses say what a step does to a unit."""

    def __init__(
        self, case: Case, units: Sequence[FlatUnit], *, world: int, stage: int, block: int | None = 2048
    ) -> None:
        self.case, self.world, self.stage, self.steps = case, world, stage, 0
        self.model = case.build()
        params = dict(self.model.named_parameters())
        self.units: list[FlatOracle] = []
        for unit in units:
            values = torch.zeros(unit.layout.numel)
            for slot in unit.layout.slots:
                values[slot.start : slot.end] = params[slot.fqn].detach().reshape(-1).float()
            slots = [(slot.fqn, slot.shape, slot.start, slot.end) for slot in unit.layout.slots]
            self.units.append(FlatOracle(slots, unit.layout.numel, unit.dtype, world, values, block))
        for unit in units:
            self.model.to(unit.dtype)

    def step(self, seeds: Sequence[int]) -> None:
        """One optimizer step over the micro batches of these seeds."""
        grads = [[self._grads(rank, seed, len(seeds)) for seed in seeds] for rank in range(self.world)]
        self.steps += 1
        for index, unit in enumerate(self.units):
            self.update(unit, [[micro[index] for micro in rank] for rank in grads])

    def take_over(self, old: Oracle) -> None:
        """Go on where an oracle of another world has stopped: every worker begins with the mean error."""
        self.steps = old.steps
        for mine, theirs in zip(self.units, old.units, strict=True):
            mean = total(theirs.worker).div_(old.world)
            for _, _, start, end in mine.slots:
                for name in ("values", "m", "v", "server"):
                    getattr(mine, name)[start:end] = getattr(theirs, name)[start:end]
                for worker in mine.worker:
                    worker[start:end] = mean[start:end]

    def update(self, unit: FlatOracle, grads: list[list[Tensor]]) -> None:
        """`grads`: [padded] per worker and micro batch."""
        raise NotImplementedError

    def mean(self, unit: FlatOracle, grads: list[list[Tensor]]) -> Tensor:
        """As the wire sums it: in rank order and the wire's dtype; at stage 0 divided before, at stage 2 every
        micro batch by itself.
        """
        scale = 1.0 / self.world
        if self.stage == 0:
            parts = [total(micros).to(unit.dtype) for micros in grads]
            return total([part * scale if self.world > 1 else part for part in parts]).float()
        if self.stage == 1:
            return total([total(micros).to(unit.dtype).float() for micros in grads]) * scale
        found = torch.zeros(unit.padded)
        for micro in range(len(grads[0])):
            found.add_(total([rank[micro].to(unit.dtype).float() for rank in grads]), alpha=scale)
        return found

    def show(self, model: nn.Module, values: Sequence[Tensor]) -> None:
        params = dict(model.named_parameters())
        with torch.no_grad():
            for unit, flat in zip(self.units, values, strict=True):
                for name, shape, start, end in unit.slots:
                    params[name].copy_(flat[start:end].view(shape))

    def _grads(self, rank: int, seed: int, micros: int) -> list[Tensor]:
        model = self.model
        self.show(model, self.values_of(rank))
        params = dict(model.named_parameters())
        found = [torch.zeros(unit.padded) for unit in self.units]
        losses = self.case.losses(model, self.case.rank_batch(seed, rank, self.world))
        (torch.stack(losses).sum() / micros).backward()
        for unit, flat in zip(self.units, found, strict=True):
            for name, _, start, end in unit.slots:
                grad = params[name].grad
                if grad is not None:
                    flat[start:end] = grad.reshape(-1).float()
        model.zero_grad()
        return found

    def values_of(self, rank: int) -> list[Tensor]:
        return [unit.values for unit in self.units]


class AdamOracle(Oracle):
    """Tang et al. 2021, algorithm 1, with AdamW's bias correction and decay."""

    lr, betas, eps, decay = 1e-2, (0.9, 0.99), 1e-8, 0.1

    def __init__(self, *args: object, freeze_step: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.freeze_step = freeze_step

    def update(self, unit: FlatOracle, grads: list[list[Tensor]]) -> None:
        beta1, beta2 = self.betas
        if self.steps <= self.freeze_step:
            grad = self.mean(unit, grads)
            unit.values *= 1 - self.lr * self.decay
            unit.m.lerp_(grad, 1 - beta1)
            unit.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denom = (unit.v.sqrt() / math.sqrt(1 - beta2**self.steps)).add_(self.eps)
            unit.values.addcdiv_(unit.m, denom, value=-(self.lr / (1 - beta1**self.steps)))
            if self.steps == self.freeze_step:
                unit.v /= 1 - beta2**self.steps
            return
        sent = [total(micros) * (1 - beta1) + beta1 * unit.m for micros in grads]
        for each in sent:
            each[~unit.used] = 0
        unit.m = unit.mean_of_signs(sent)
        update = unit.m / (unit.v.sqrt() + self.eps)
        update[unit.v == 0] = 0
        unit.values *= 1 - self.lr * self.decay
        unit.values.add_(update, alpha=-self.lr / (1 - beta1**self.steps))
