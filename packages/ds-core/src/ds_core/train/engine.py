"""One training step: forward, backward, and a step that is counted, clipped, scaled and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, Saveable, SavedTensor
from ds_core.train.clip import clip_coefficient, global_norm, scale_grads_
from ds_core.train.nonfinite import NonFiniteError, first_nonfinite
from ds_core.train.optim import ShardedOptimizer
from ds_core.train.scale import LossScaler
from ds_core.train.schedule import saveable


class Scheduler(Protocol):
    """What a learning-rate schedule offers: torch's own, or ds_core.lr's."""

    def step(self) -> None: ...


class Sink(Protocol):
    """Where reports go: ds_core.MetricsLog, or anything with the same method."""

    def log(self, step: int, **values: float) -> None: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did.

    `loss`: mean over this rank's micro batches, undivided and unscaled. `grad_norm`: of the averaged,
    unscaled gradient, before clipping. `bytes_on_wire`: sent by this rank since the step before, by axis.
    """

    step: int
    loss: float
    grad_norm: float
    clip_coef: float
    skipped: bool
    lr: float
    loss_scale: float
    bytes_on_wire: Mapping[str, int] = field(default_factory=dict)


class Engine:
    """A model, its owner and its optimizer as one step, in place.

    `engine(batch)` runs the model, `engine.backward(loss)` scales and divides the loss, `engine.step()` acts
    on every `accumulate`-th call. `train_batch` does all three. Collective: every rank makes the same calls.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: FlatOwner,
        optimizer: ShardedOptimizer,
        *,
        max_norm: float | None = None,
        accumulate: int = 1,
        scaler: LossScaler | None = None,
        scheduler: Scheduler | None = None,
        sink: Sink | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1 micro batch, got {accumulate}")
        if owner.precision.param is torch.float16 and scaler is None:
            raise ValueError("fp16 gradients underflow without a loss scale: pass scaler=DynamicScale()")
        if owner.precision.param is not torch.float16 and scaler is not None:
            raise ValueError(
                f"a loss scale is for fp16 only, parameters are {owner.precision.param}; leave it out"
            )
        self.model, self.owner, self.optimizer = model, owner, optimizer
        self.max_norm, self.accumulate = max_norm, accumulate
        self.scaler, self.scheduler, self.sink = scaler, scheduler, sink
        self.global_steps = 0
        self.skipped_steps = 0
        self.report: StepReport | None = None
        optimizer.wait = False
        self._micro = 0
        self._losses: list[Tensor] = []
        self._again: Callable[[], object] | None = None  # the last forward, should it need explaining

    # -- the three-call form -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        self._again = lambda: self.model(*args, **kwargs)
        return self.model(*args, **kwargs)

    @property
    def at_boundary(self) -> bool:
        """Does the next `step` call update the weights?"""
        return self._micro + 1 >= self.accumulate

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Backward of loss / accumulate, times the loss scale. Raises ValueError unless it is one number."""
        if loss.numel() != 1:
            raise ValueError(
                f"backward needs a loss of one element, got shape {tuple(loss.shape)}; reduce it first"
            )
        self._losses.append(loss.detach().float().reshape(()))
        scaled = loss / self.accumulate if self.accumulate > 1 else loss
        if self.scaler is not None:
            scaled = self.scaler.scale(scaled)
        with self.owner.micro_step(last=self.at_boundary):
            scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def step(self) -> StepReport | None:
        """Count a micro batch; on the last one update the weights and report, else None.

        Raises NonFiniteError before any weight is touched when gradients are not finite and no loss scale can
        help, naming the step, the rank's loss and the first module that went wrong.
        """
        if not self._losses:
            raise RuntimeError("step() without a backward: call engine.backward(loss) first")
        self._micro += 1
        if self._micro < self.accumulate:
            return None
        scale = self.scaler.value if self.scaler is not None else 1.0
        norm = global_norm(self.optimizer) / scale
        finite = bool(torch.isfinite(norm))
        if not finite and self.scaler is None:
            self._explain_nonfinite()
        coefficient = self._update(norm, scale) if finite else 1.0
        if not finite:
            self.optimizer.skip_step()
            self.skipped_steps += 1
        if self.scaler is not None:
            self.scaler.update(overflow=not finite)
        return self._finish(float(norm), coefficient, scale, skipped=not finite)

    def train_batch(self, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> StepReport:
        """One whole step: `accumulate` micro batches, each `loss_fn(model, batch)`."""
        report, count = None, 0
        for batch in batches:
            if count == self.accumulate:
                raise ValueError(
                    f"train_batch takes {self.accumulate} micro batches, got more; change accumulate"
                )
            self._again = partial(loss_fn, self.model, batch)
            self.backward(loss_fn(self.model, batch))
            count += 1
            report = self.step()
        if report is None:
            raise ValueError(
                f"train_batch takes {self.accumulate} micro batches, got {count}; the gradients so far are "
                "kept, call zero_grad() to drop them"
            )
        return report

    def zero_grad(self) -> None:
        """Drop gradients and start the count of micro batches anew."""
        self.optimizer.zero_grad()
        self._losses.clear()
        self._micro = 0

    def _update(self, norm: Tensor, scale: float) -> float:
        factor = torch.full_like(norm, 1.0 / scale)
        coefficient = 1.0
        if self.max_norm:
            clip = clip_coefficient(norm, self.max_norm)
            factor, coefficient = factor * clip, float(clip)
        scale_grads_(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        return coefficient

    def _finish(self, norm: float, coefficient: float, scale: float, *, skipped: bool) -> StepReport:
        log = self.owner.mesh.log
        loss = float(torch.stack(self._losses).mean())
        self.global_steps += 1
        self.report = StepReport(
            step=self.global_steps,
            loss=loss,
            grad_norm=norm,
            clip_coef=coefficient,
            skipped=skipped,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            loss_scale=scale,
            bytes_on_wire=log.bytes_by_axis(),
        )
        log.clear()
        self._losses.clear()
        self._micro, self._again = 0, None
        if self.sink is not None and not (skipped and math.isnan(loss)):
            self.sink.log(
                self.report.step,
                loss=loss,
                grad_norm=norm,
                lr=self.report.lr,
                loss_scale=scale,
                skipped=float(skipped),
            )
        return self.report

    def _explain_nonfinite(self) -> None:
        losses = [float(loss) for loss in self._losses]
        where = first_nonfinite(self.model, self._again) if self._again else None
        rank = self.owner.comm.rank
        self.zero_grad()
        raise NonFiniteError(
            f"step {self.global_steps + 1}: gradients are not finite (rank {rank}'s loss: {losses[-1]:g}); "
            f"first: {where or 'no module in the forward, so the loss function or a backward'}. "
            "No weight was changed. Lower the learning rate, clip (max_norm), or look at this batch"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Saveable]:
        """Everything of this engine that belongs into a checkpoint, by part name."""
        found: dict[str, Saveable] = {"model": self.owner, "optimizer": self.optimizer, "engine": self}
        if self.scaler is not None:
            found["scaler"] = self.scaler
        if self.scheduler is not None:
            found["scheduler"] = saveable(self.scheduler)
        return found

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        return {"global_steps": self.global_steps, "skipped_steps": self.skipped_steps}

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        if saved:
            raise ValueError(f"the engine holds no tensors, the checkpoint has {sorted(saved)}")
        return {}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        self.global_steps = int(values["global_steps"])
        self.skipped_steps = int(values["skipped_steps"])
