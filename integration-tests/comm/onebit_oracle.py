"""1-bit optimizers as their papers have them: plain torch, all workers in one process, nothing sharded.

Shared with the real thing are facts, not code: where parameters sit in a unit, how many ranks cut it.
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

    def in_units(self, sent: Sequence[Tensor]) -> Tensor:
        """As `mean_of_signs`, sent in units of a power of two near the variance's root, 8 of them at most."""
        exponent = torch.frexp(self.v).exponent
        unit = torch.tensor([2.0 ** (int(e) // 2) for e in exponent.tolist()])
        alive = self.v > 0
        errors = [*self.worker, self.server]
        for error in errors:
            error.copy_(torch.where(alive, error / unit, 0.0))
        found = self.mean_of_signs([torch.where(alive, each / unit, 0.0).clamp(-8, 8) for each in sent])
        for error in errors:
            error.copy_(torch.where(alive, error * unit, 0.0))
        return torch.where(alive, found * unit, 0.0)

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
        """As the wire sums it: in rank order and its dtype; at stage 0 divided before, at stage 2 every micro
        batch by itself.
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
        unit.m = unit.in_units(sent)
        update = (unit.m / (unit.v.sqrt() + self.eps)).clamp(-1.0, 1.0)  # Adam's own, with these betas
        update[unit.v == 0] = 0
        unit.values *= 1 - self.lr * self.decay
        unit.values.add_(update, alpha=-self.lr / (1 - beta1**self.steps))


class ZeroOneOracle(Oracle):
    """Lu et al. 2022, algorithm 1, with bias corrections and AdamW's decay: every worker by itself."""

    lr, betas, eps, decay = 1e-2, (0.9, 0.99), 1e-8, 0.1

    def __init__(self, *args: object, freeze: int, kappa: int, scaler: int, clipper: int, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.freeze, self.scaler, self.clipper = freeze, scaler, clipper
        refreshes, at = [1], 0
        while refreshes[-1] <= freeze:
            refreshes.append(refreshes[-1] + 2 ** (at // kappa))
            at += 1
        self.refreshes = {step for step in refreshes if step <= freeze}
        self.kinds: list[str] = []
        self.alone = 0
        self.x = [[u.values.clone() for u in self.units] for _ in range(self.world)]
        self.ms = [[u.m.clone() for u in self.units] for _ in range(self.world)]
        self.us = [[torch.zeros(u.padded) for u in self.units] for _ in range(self.world)]
        self.length, self.kept, self.refreshed = 0.0, 1.0, 0

    def values_of(self, rank: int) -> list[Tensor]:
        return self.x[rank]

    def step(self, seeds: Sequence[int]) -> None:
        t = self.steps + 1
        if t <= self.freeze:
            kind = "plain" if t in self.refreshes else "signs"
        else:
            interval = min(self.clipper, 2 ** ((t - self.freeze - 1) // self.scaler))
            kind = "signs" if self.alone + 1 >= interval else "local"
        self.kinds.append(kind)
        self.refreshed += kind == "plain"
        super().step(seeds)
        lr, beta1 = self.lr, self.betas[0]
        if kind == "local":
            self.alone += 1
            self.length += lr / (1 - beta1**t)
            self.kept *= 1 - lr * self.decay
        else:
            self.alone, self.length, self.kept = 0, 0.0, 1.0

    def update(self, unit: FlatOracle, grads: list[list[Tensor]]) -> None:
        at, (beta1, beta2), kind = self.units.index(unit), self.betas, self.kinds[-1]
        gamma, keep = self.lr / (1 - beta1**self.steps), 1 - self.lr * self.decay
        workers = range(self.world)
        if kind == "plain":
            grad = self.mean(unit, grads)
            unit.m.lerp_(grad, 1 - beta1)
            unit.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            for rank in workers:
                self.ms[rank][at] = unit.m.clone()
        else:
            for rank in workers:
                mine = total(grads[rank]) * (1 - beta1) + beta1 * self.ms[rank][at]
                self.ms[rank][at] = torch.where(unit.used, mine, 0.0)
        variance = unit.v / (1 - beta2**self.refreshed)

        def direction(momentum: Tensor, limit: float = 1.0) -> Tensor:
            found = (momentum / (variance.sqrt() + self.eps)).clamp(-limit, limit)
            return torch.where(unit.v == 0, 0.0, found)

        if kind == "local":
            for rank in workers:
                self.us[rank][at].add_(self.ms[rank][at], alpha=gamma)
                self.x[rank][at] = unit.values * (self.kept * keep) - direction(
                    self.us[rank][at], self.length + gamma
                )
            return
        if kind == "signs":
            sent = [self.ms[rank][at] for rank in workers]
            if self.alone:
                sent = [(m * gamma + self.us[r][at]) / (self.length + gamma) for r, m in enumerate(sent)]
            unit.m = unit.in_units(sent)
        if self.alone:
            step = direction(unit.m) * (self.length + gamma)
            unit.values = unit.values * (self.kept * keep) - step
        else:
            unit.values *= keep
            unit.values.add_(direction(unit.m), alpha=-gamma)
        for rank in workers:
            self.x[rank][at], self.ms[rank][at] = unit.values.clone(), unit.m.clone()
            self.us[rank][at].zero_()


class LambOracle(Oracle):
    """Li et al. 2021, algorithm 1, over LAMB with bias corrections, layer by layer."""

    lr, betas, eps, decay = 1e-2, (0.9, 0.99), 1e-6, 0.1
    low, high, beta3, factors, threshold = 0.01, 10.0, 0.9, (0.5, 4.0), 0.1

    def __init__(self, *args: object, freeze_step: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.freeze_step = freeze_step
        self.coefficients: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        self.last: dict[str, Tensor] = {}
        self.fresh: dict[str, Tensor] = {}

    def step(self, seeds: Sequence[int]) -> None:
        super().step(seeds)
        if self.steps == self.freeze_step:
            sizes = {}
            for unit in self.units:
                unit.v /= 1 - self.betas[1] ** self.steps
                for name, _, start, end in unit.slots:
                    sizes[name] = float(unit.m[start:end].double().square().mean().sqrt())
                    self.coefficients[name] /= 1 - self.beta3**self.steps
                    self.fresh[name] = unit.v[start:end].clone()
                    self.last[name] = torch.tensor(1.0)
            known = torch.tensor([size for size in sizes.values() if size > 0], dtype=torch.float64)
            united = float(known.mean())
            self.scales = {name: united / size if size > 0 else 1.0 for name, size in sizes.items()}

    def update(self, unit: FlatOracle, grads: list[list[Tensor]]) -> None:
        beta1, beta2 = self.betas
        if self.steps <= self.freeze_step:
            grad = self.mean(unit, grads)
            unit.m.lerp_(grad, 1 - beta1)
            unit.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            for name, shape, start, end in unit.slots:
                x, m, v = (t[start:end].view(shape) for t in (unit.values, unit.m, unit.v))
                denom = v.sqrt() * (1 - beta2**self.steps) ** -0.5 + self.eps
                update = (m / (1 - beta1**self.steps) / denom).add_(x, alpha=self.decay)
                ratio = (x.norm() / update.norm()).clamp(self.low, self.high)
                if not (x.norm() > 0 and update.norm() > 0):
                    ratio = torch.tensor(1.0)
                mean = self.coefficients.setdefault(name, torch.tensor(0.0))
                mean.mul_(self.beta3).add_(ratio, alpha=1 - self.beta3)
                x -= update * (self.lr * ratio)
            return
        sent = [total(micros) * (1 - beta1) + beta1 * unit.m for micros in grads]
        for each in sent:
            each[~unit.used] = 0
            for name, _, start, end in unit.slots:
                each[start:end] *= self.scales[name]
        before, unit.m = unit.m, unit.mean_of_signs(sent)
        for name, shape, start, end in unit.slots:
            unit.m[start:end] /= self.scales[name]
            x, m, v = (t[start:end].view(shape) for t in (unit.values, unit.m, unit.v))
            implied = (m - before[start:end].view(shape) * beta1) / (1 - beta1)
            fresh = self.fresh[name].view(shape)
            fresh.mul_(beta2).addcmul_(implied, implied, value=1 - beta2)
            alone = m / (1 - beta1**self.steps) / (v.sqrt() + self.eps)
            alone = alone.clamp(-1.0, 1.0)
            alone[v == 0] = 0
            update = alone.add(x, alpha=self.decay)
            factor = ((v.sqrt() + self.eps) / (fresh.sqrt() + self.eps)).max()
            share = min(alone.norm() / update.norm(), torch.tensor(1.0))
            factor = (factor * share + (1 - share)).clamp(*self.factors)
            last = self.last[name]
            low, high = last * (1 - self.threshold), last * (1 + self.threshold)
            self.last[name] = max(min(factor, high), low)
            x -= update * (self.lr * self.coefficients[name] * self.last[name])
