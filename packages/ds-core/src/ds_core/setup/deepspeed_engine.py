"""The engine with the names that DeepSpeed users call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.setup import deepspeed_checkpoint
from ds_core.setup.deepspeed_states import PhasedEngine
from ds_core.setup.plan import LossScale, Plan
from ds_core.setup.progress import Progress
from ds_core.state.owner import FlatOwner
from ds_core.state.shard import Json, Saveable
from ds_core.train.engine import Scheduler, Sink, StepReport
from ds_core.train.optim import ShardedOptimizer
from ds_core.train.sampler import ResumableLoader
from ds_core.train.scale import DynamicScale, LossScaler, StaticScale


class DeepSpeedEngine(PhasedEngine):
    """Engine, with what DeepSpeed scripts expect of the object that `initialize` returns.

    Attributes that are not the engine's are the model's: `parameters()`, `train()`, `config`... `backward`
    divides by the accumulation and `step` acts on every last micro batch, unless
    `set_gradient_accumulation_boundary` says which one that is.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: FlatOwner,
        optimizer: ShardedOptimizer,
        plan: Plan,
        *,
        scheduler: Scheduler | None = None,
        sink: Sink | None = None,
        loader: ResumableLoader | None = None,
    ) -> None:
        scaler = _scaler(plan)
        fp16 = plan.dtype == "float16"
        super().__init__(
            model,
            owner,
            optimizer,
            max_norm=plan.max_norm,
            accumulate=plan.accumulate,
            scaler=scaler if fp16 else None,
            scheduler=scheduler,
            sink=sink,
        )
        self.scaler = scaler  # also for fp16 autocast, and to skip a bf16 step as DeepSpeed does
        self.plan, self.loader = plan, loader
        self.module, self.lr_scheduler, self.training_dataloader = model, scheduler, loader
        self.device = owner.device
        self.global_rank, self.world_size = owner.everyone.rank, owner.everyone.world
        self.progress = Progress(plan.reporting, owner.mesh.accelerator, self.global_rank)
        self._boundary: bool | None = None

    def __getattr__(self, name: str) -> Any:
        """What is not the engine's own is the model's."""
        model = self.__dict__.get("module")
        if model is None:
            raise AttributeError(name)
        return getattr(model, name)

    # -- one step ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: inputs cast for fp16.auto_cast, under autocast for torch_autocast."""
        if self.plan.cast_inputs:
            args, kwargs = _to_half(args), _to_half(kwargs)
        dtype = getattr(torch, self.plan.autocast) if self.plan.autocast else None
        cast = torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with self.progress.phase("forward"), cast:
            return super().__call__(*args, **kwargs)

    def backward(  # type: ignore[override]  # DeepSpeed's returns the loss
        self,
        loss: Tensor,
        *,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        tokens: float | Tensor | None = None,
    ) -> Tensor:
        """As DeepSpeed's, and `tokens` as Engine's.

        `scale_wrt_gas=False`: the loss is divided by the accumulation already.
        """
        with self.progress.phase("backward"):
            undivided = loss if scale_wrt_gas else loss * self.accumulate
            super().backward(undivided, tokens=tokens, retain_graph=retain_graph)
        return loss

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> StepReport | None:
        """Call after every backward; updates on the boundary. Returns the report then, else None."""
        if lr_kwargs:
            raise ValueError(
                f"step(lr_kwargs={dict(lr_kwargs)}): the schedule counts steps by itself; leave it out"
            )
        if self._boundary is not None:
            self._micro = self.accumulate - 1 if self._boundary else -1
        with self.progress.phase("step"):
            report = super().step()
        if report is not None:
            self.progress.tick(report, self.plan.train_batch_size, self.skipped_steps, self.get_lr())
        return report

    @property
    def at_boundary(self) -> bool:
        """Does the next `step` call update the weights?"""
        return super().at_boundary if self._boundary is None else self._boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on the caller says whether the present micro batch is the last of its step."""
        self._boundary = is_boundary

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.at_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Legal at every stage, and without effect: how gradients accumulate is the stage's business."""
        yield

    def was_step_applied(self) -> bool:
        """Did the last `step` on a boundary change the weights?"""
        return self.report is not None and not self.report.skipped

    # -- asking --------------------------------------------------------------------------------------------

    def train_batch_size(self) -> int:
        return self.plan.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.plan.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.accumulate

    def zero_optimization_stage(self) -> int:
        return self.plan.stage

    def get_lr(self) -> list[float]:
        """Of every parameter group, for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        """Of the last step's averaged, unscaled gradient, before clipping."""
        return None if self.report is None else self.report.grad_norm

    # -- checkpoints ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Saveable]:
        """The engine's parts, and the position in the training data."""
        parts = super().parts()
        if self.loader is not None:
            parts["loader"] = self.loader
        return parts

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Json = None,
        save_latest: bool = True,
    ) -> bool:
        """Write `save_dir/tag`, which loads at any world size and stage; see deepspeed_checkpoint.save."""
        return deepspeed_checkpoint.save(
            self,
            Path(save_dir),
            tag,
            client_state,
            save_latest=save_latest,
            validation=self.plan.tag_validation,
        )

    def load_checkpoint(
        self, load_dir: str | Path, tag: str | None = None, **which: bool
    ) -> tuple[str | None, Json]:
        """(directory, client state); see deepspeed_checkpoint.load for `which`."""
        return deepspeed_checkpoint.load(self, Path(load_dir), tag, **which)

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors") -> bool:
        """The model's weights in their own dtype, whole, in one safetensors file."""
        return deepspeed_checkpoint.save_model(self.owner, Path(save_dir), save_filename)


def _scaler(plan: Plan) -> LossScaler | None:
    scale: LossScale | None = plan.loss_scale
    if scale is None:
        return StaticScale(1.0) if plan.skip_overflow else None
    if scale.static is not None:
        return StaticScale(scale.static)
    return DynamicScale(
        scale.initial,
        window=scale.window,
        hysteresis=scale.hysteresis,
        minimum=scale.minimum,
        consecutive_hysteresis=scale.consecutive_hysteresis,
    )


def _to_half(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.half() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _to_half(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_half(item) for item in value)
    return value
