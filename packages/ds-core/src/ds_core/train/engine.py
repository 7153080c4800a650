"""One training step: forward, backward, and a step that is counted, clipped, scaled and reported."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_core.ground.settings import Settings
from ds_core.limits import refuse
from ds_core.state.forwards import swapped_in
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import FlatShard, Json, Saveable, SavedTensor
from ds_core.train.clip import scaled_grads, square_and_sums
from ds_core.train.explain import explain_engine
from ds_core.train.memory import explaining_oom
from ds_core.train.nonfinite import NonFiniteError, explain_nonfinite
from ds_core.train.optim import ShardedOptimizer, optimizers_of
from ds_core.train.scale import LossScaler
from ds_core.train.schedule import saveable
from ds_core.train.tally import TOKENS_PER_UNIT, Tally


class Scheduler(Protocol):
    """What a learning-rate schedule offers: torch's own, or ds_core.lr's."""

    def step(self) -> None: ...


class Sink(Protocol):
    """Where reports go: ds_core.MetricsLog, or anything with the same method."""

    def log(self, step: int, **values: float) -> None: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did: the same numbers on every rank, except `bytes_on_wire`.

    `loss`: mean over all micro batches of all ranks, or over all `tokens` where they were counted; undivided
    and unscaled. `grad_norm`: of the averaged, unscaled gradient, before clipping. `clipped_norm` =
    grad_norm * clip_coef is what the optimizer got; both are 0 for a skipped step. `bytes_on_wire`: sent by
    this rank since the step before, by axis.
    """

    step: int
    loss: float
    grad_norm: float
    clipped_norm: float
    clip_coef: float
    skipped: bool
    lr: float
    loss_scale: float
    tokens: int | None = None
    bytes_on_wire: Mapping[str, int] = field(default_factory=dict)


class Engine:
    """A model, its owner and its optimizer as one step, in place.

    `engine(batch)` runs the model, `engine.backward(loss)` scales and divides the loss, `engine.step()` acts
    on every `accumulate`-th call. `train_batch` does all three. Collective: every rank makes the same calls.
    Where micro batches hold different numbers of tokens, `backward(loss, tokens=n)` makes every token count
    the same. See [Note: tokens are counted at the end].
    """

    overflows_before_naming = (
        5  # dynamic scales start high: a few overflows in a row are a search, not a fault
    )

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
        joined = owner.features | swapped_in(owner.model) | ({"accumulation"} if accumulate > 1 else set())
        refuse(owner.stage, joined | ({"loss scale"} if scaler is not None else set()))
        if optimizer.owner is not owner:
            raise ValueError(
                "the optimizer steps on the parameters of another model: build it from this model's, and "
                "ShardedOptimizer(optimizer, owner) with the owner that the engine is given"
            )
        _refuse_others(optimizer)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, or None for no clipping, got {max_norm}")
        self.model, self.owner, self.optimizer = model, owner, optimizer
        self.max_norm, self.accumulate = max_norm, accumulate
        self.scaler, self.scheduler, self.sink = scaler, scheduler, sink
        self.global_steps = 0
        self.skipped_steps = 0
        self.report: StepReport | None = None
        optimizer.wait = False
        self._micro = 0
        self._tally = Tally()
        self._tokens_factor = 1.0  # of the last step: what tokens made of its gradients
        self._spent: weakref.ref[Tensor] | None = None  # the loss whose graph is used up
        self._overflows = 0  # in a row
        self._again: Callable[[], object] | None = None  # the last forward, should it need explaining

    # -- the three-call form -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        self._again = lambda: self.model(*args, **kwargs)
        with self._explaining_oom():
            return self.model(*args, **kwargs)

    @property
    def at_boundary(self) -> bool:
        """Does the next `step` call update the weights?"""
        return self._micro + 1 >= self.accumulate

    def backward(
        self, loss: Tensor, *, tokens: float | Tensor | None = None, retain_graph: bool = False
    ) -> None:
        """Backward of loss / accumulate, times the loss scale.

        Several losses of one micro batch add up: all but the last say `retain_graph=True`.
        `tokens`: how many the loss is a mean over, on this rank. Given to every backward of a step, on every
        rank, they replace the division: the step's gradient is the mean over all its tokens. A tensor is not
        read on the host. Raises ValueError unless the loss is one number with a graph, RuntimeError when it
        went backward before.
        """
        if loss.numel() != 1:
            raise ValueError(
                f"backward needs a loss of one element, got shape {tuple(loss.shape)}; reduce it first"
            )
        if not loss.requires_grad:
            raise ValueError(
                "this loss has no gradient: it was computed under no_grad, or from nothing that trains"
            )
        if self._spent is not None and self._spent() is loss:
            raise RuntimeError(
                "this loss went backward before, and its graph is gone: run the forward again, or say "
                "retain_graph=True the first time"
            )
        if tokens is not None and self.owner.reducer.share != 1.0:
            raise ValueError(
                "join weighs ranks already: give it weigh=False, and tokens=0 where it is not active"
            )
        self.owner.parked.need("a backward", "param", "grad")
        scaled = loss * self._tally.weight(tokens, self.accumulate)
        if self.scaler is not None:
            scaled = self.scaler.scale(scaled)
        if self.at_boundary:
            scale = self.scaler.value if self.scaler is not None else 1.0
            self.optimizer.expect(self._tokens_factor / scale)
        with self._explaining_oom(), self.owner.micro_step(last=self.at_boundary):
            scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        self._tally.add(loss, tokens, retained=retain_graph)
        self._spent = None if retain_graph else weakref.ref(loss)

    def step(self) -> StepReport | None:
        """Count a micro batch; on the last one update the weights and report, else None.

        Raises NonFiniteError before any weight is touched when gradients are not finite and no loss scale can
        help, naming the first module and the first gradient that went wrong; so does an overflow at the
        smallest loss scale, and every `overflows_before_naming`-th overflow in a row warns with the names.
        """
        self.owner.parked.need("a step", "param", "grad", "master", "moment")
        self._tally.end_micro()
        self._micro += 1
        if self._micro < self.accumulate:
            return None
        scale = self.scaler.value if self.scaler is not None else 1.0
        square, *sums = square_and_sums(self.optimizer, self._tally.sums(self.owner.device)).tolist()
        try:
            totals = self._tally.totals(sums)
        except (ValueError, RuntimeError):
            self.zero_grad()
            raise
        self._tokens_factor = totals.factor
        factor = totals.factor / scale
        norm = math.sqrt(square) * factor
        finite = math.isfinite(norm)
        coefficient = 0.0
        if finite:
            coefficient = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
            self._update(factor * coefficient)
            self._overflows = 0
        else:
            self._skip()
        if self.scaler is not None and finite:
            self.scaler.update(overflow=False)
        self.global_steps += 1
        self.report = StepReport(
            step=self.global_steps,
            loss=totals.loss,
            grad_norm=norm,
            clipped_norm=norm * coefficient if finite else 0.0,
            clip_coef=coefficient,
            skipped=not finite,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            loss_scale=scale,
            tokens=totals.tokens,
            bytes_on_wire=self.owner.mesh.log.bytes_by_axis(),
        )
        return self._finish(self.report)

    def train_batch(self, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> StepReport:
        """One whole step: `accumulate` micro batches, each `loss_fn(model, batch)`."""
        report, count = None, 0
        for batch in batches:
            if count == self.accumulate:
                raise ValueError(
                    f"train_batch takes {self.accumulate} micro batches, got more; change accumulate"
                )
            self._again = partial(loss_fn, self.model, batch)
            with self._explaining_oom():
                loss = loss_fn(self.model, batch)
            self.backward(loss)
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
        self._tally.clear()
        self._micro = 0

    def _update(self, factor: float) -> None:
        # The first step allocates the optimizer's state.
        with scaled_grads(self.optimizer, factor), self._explaining_oom():
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def _finish(self, report: StepReport) -> StepReport:
        self.owner.mesh.log.clear()
        self._tally.clear()
        self._micro, self._again = 0, None
        if self.sink is not None and not (report.skipped and math.isnan(report.loss)):
            counted = {} if report.tokens is None else {"tokens": float(report.tokens)}
            self.sink.log(
                report.step,
                loss=report.loss,
                grad_norm=report.grad_norm,
                clipped_norm=report.clipped_norm,
                lr=report.lr,
                loss_scale=report.loss_scale,
                skipped=float(report.skipped),
                **counted,
            )
        return report

    def _explaining_oom(self) -> AbstractContextManager[None]:
        return explaining_oom(self.owner, self.optimizer, self.accumulate)

    # -- when gradients are not finite ---------------------------------------------------------------------

    def _skip(self) -> None:
        """Leave every weight as it is; lower the loss scale, or say what went wrong where it cannot help."""
        self._overflows += 1
        if self.scaler is None:
            raise self._nonfinite(
                "Lower the learning rate, clip (max_norm), or look at this batch", "gradients are not finite"
            )
        try:
            self.scaler.update(overflow=True)
        except FloatingPointError as error:
            raise self._nonfinite("", str(error)) from None
        if self._overflows % self.overflows_before_naming == 0:
            where = self._where()
            if self.owner.everyone.rank == 0:
                warnings.warn(
                    f"step {self.global_steps + 1}: {self._overflows} overflows in a row, the loss scale is "
                    f"{self.scaler.value:g} now; {where}. bfloat16 has no such limits",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self.optimizer.skip_step()
        self.skipped_steps += 1

    def _where(self) -> str:
        return explain_nonfinite(self.model, self.owner, self._again, self._tally.losses)

    def _nonfinite(self, advice: str, what: str) -> NonFiniteError:
        where = self._where()
        self.zero_grad()
        said = f"step {self.global_steps + 1}: {what}; {where}. No weight was changed"
        return NonFiniteError(f"{said}. {advice}" if advice else said)

    def explain(self) -> Settings:
        """Every effective setting: its value, where it came from, whether it is active and where it acts."""
        return explain_engine(self)

    # -- between phases ------------------------------------------------------------------------------------

    def offload_states(self, *kinds: str, to: Any = "host") -> int:
        """Take params, grads, masters, moments (none named: all) out of device memory until `reload_states`.

        `to`: "host", "nvme:<folder>" or a ds_offload.Volume. Bytes freed. Collective; see ds_offload.park.
        """
        return self.owner.parked.lot(self.owner).park(kinds, to)

    def reload_states(self, *kinds: str) -> int:
        """Bring back what was parked (none named: all of it), as it was. Bytes that came. Collective."""
        return self.owner.parked.lot(self.owner).reload(kinds)

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
        return {
            "global_steps": self.global_steps,
            "skipped_steps": self.skipped_steps,
            "tokens_per_unit": self._tally.unit,
        }

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        if saved:
            raise ValueError(f"the engine holds no tensors, the checkpoint has {sorted(saved)}")
        return {}

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        self.global_steps = int(values["global_steps"])
        self.skipped_steps = int(values["skipped_steps"])
        self._tally.unit = float(values.get("tokens_per_unit", TOKENS_PER_UNIT))


def _refuse_others(optimizer: ShardedOptimizer) -> None:
    """Raises ValueError for parameters that only another optimizer steps on: the engine never would."""
    for other in optimizers_of(optimizer.owner):
        for unit, indices in other.slots.items():
            strange = [index for index in indices if index not in optimizer.slots.get(unit, ())]
            if strange:
                raise ValueError(
                    f"{type(other.optimizer).__name__} steps on {unit.layout.slots[strange[0]].fqn}, and an "
                    "engine steps with one optimizer: join them with JointOptimizer([...]) before sharding"
                )
