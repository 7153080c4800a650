"""The contenders of the training-step benchmark: each turns a model into step(batches)."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]
Step = Callable[
    [Batches], float | None
]  # returns the seconds in the optimizer's step, where that is one call


@dataclass(frozen=True)
class Setting:
    """What one run is asked to do."""

    world: int
    accumulate: int
    bf16: bool


class Absent(Exception):
    """A peer that is not installed; the reason is printed."""


CONTENDERS: dict[str, Callable[[nn.Module, Setting], Step]] = {}


def contender(fn: Callable[[nn.Module, Setting], Step]) -> Callable[[nn.Module, Setting], Step]:
    CONTENDERS[fn.__name__] = fn
    return fn


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    autocast: bool = False,
    sync: Callable[[bool], contextlib.AbstractContextManager[Any]] | None = None,
) -> Step:
    def step(batches: Batches) -> float:
        for number, (ids, labels) in enumerate(batches):
            last = number == len(batches) - 1
            with sync(last) if sync else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = model(ids, labels)
                (loss / len(batches)).backward()
        began = time.perf_counter()
        optimizer.step()
        spent = time.perf_counter() - began
        optimizer.zero_grad()
        return spent

    return step


def fused(params: Any) -> torch.optim.Optimizer:
    if importlib.util.find_spec("ds_kernels") is None:
        raise Absent("ds-kernels is not installed")
    from ds_kernels import FusedAdamW

    optimizer: torch.optim.Optimizer = FusedAdamW(params, lr=1e-4)
    return optimizer


# -- ours ---------------------------------------------------------------------------------------------------


def _ours(model: nn.Module, setting: Setting, stage: int, optimizer_of: Callable[[Any], Any]) -> Step:
    from ds_zero import shard

    dtype = torch.bfloat16 if setting.bf16 else None
    model, optimizer = shard(model, optimizer_of(model.parameters()), stage=stage, dtype=dtype)
    return loop(model, optimizer, setting)


@contender
def ds_zero_1(model: nn.Module, setting: Setting) -> Step:
    return _ours(model, setting, 1, adamw)


@contender
def ds_zero_2(model: nn.Module, setting: Setting) -> Step:
    return _ours(model, setting, 2, adamw)


@contender
def ds_zero_2_fused(model: nn.Module, setting: Setting) -> Step:
    """As ds_zero_2, with ds-kernels' AdamW, which writes the bf16 shard in the same pass."""
    return _ours(model, setting, 2, fused)


@contender
def ds_zero_2_low(model: nn.Module, setting: Setting) -> Step:
    """As ds_zero_2, with gradients that accumulate in bf16."""
    return _ours_low(model, setting, adamw)


@contender
def ds_zero_2_low_fused(model: nn.Module, setting: Setting) -> Step:
    """As ds_zero_2_low, with ds-kernels' AdamW, which reads the bf16 gradients as they are."""
    return _ours_low(model, setting, fused)


def _ours_low(model: nn.Module, setting: Setting, optimizer_of: Callable[[Any], Any]) -> Step:
    from ds_core import ShardedOptimizer
    from ds_zero import Zero

    optimizer, low = optimizer_of(model.parameters()), "bfloat16" if setting.bf16 else None
    ShardedOptimizer(optimizer, Zero(stage=2, dtype=low, grad_dtype=low).shard(model))
    return loop(model, optimizer, setting)


@contender
def ds_zero_3(model: nn.Module, setting: Setting) -> Step:
    return _ours(model, setting, 3, adamw)


@contender
def ds_zero_3_lean(model: nn.Module, setting: Setting) -> Step:
    """Stage 3 with the smallest prefetch, and nothing but the last unit kept from forward to backward."""
    from ds_core import ShardedOptimizer
    from ds_zero import Zero

    optimizer = adamw(model.parameters())
    zero = Zero(stage=3, dtype="bfloat16" if setting.bf16 else None, prefetch_numel=1, keep_numel=1)
    ShardedOptimizer(optimizer, zero.shard(model))
    return loop(model, optimizer, setting)


# -- bound and peers ----------------------------------------------------------------------------------------


@contender
def no_communication(model: nn.Module, setting: Setting) -> Step:
    """The bound: the same compute, and an optimizer over 1/world of the elements, with nothing sent."""
    if setting.bf16:
        model = model.bfloat16()
    params = list(model.parameters())
    share = sum(p.numel() for p in params) // setting.world
    master = nn.Parameter(torch.cat([p.detach().flatten().float() for p in params])[:share].clone())
    master.grad = torch.zeros_like(master)
    optimizer = adamw([master])

    def step(batches: Batches) -> None:
        for ids, labels in batches:
            (model(ids, labels) / len(batches)).backward()
        at = 0
        for p in params:
            width = min(p.numel(), share - at)
            if width > 0:
                master.grad[at : at + width].copy_(p.grad.flatten()[:width])
                at += width
        optimizer.step()
        at = 0
        with torch.no_grad():
            for p in params:
                width = min(p.numel(), share - at)
                if width > 0:
                    p.view(-1)[:width].copy_(master[at : at + width])
                    at += width
                p.grad = None

    return step


@contender
def ddp(model: nn.Module, setting: Setting) -> Step:
    return ddp_with(model, setting, lambda wrapped: None)


def ddp_with(
    model: nn.Module, setting: Setting, register: Callable[[Any], object], *, bucket_mb: int | None = None
) -> Step:
    """DDP; `register(wrapped)` may give it a communication hook. `bucket_mb` None is DDP's own choice."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    register(wrapped)
    return loop(
        wrapped,
        adamw(model.parameters()),
        setting,
        autocast=setting.bf16,
        sync=lambda last: contextlib.nullcontext() if last else wrapped.no_sync(),
    )


@contender
def zero_redundancy(model: nn.Module, setting: Setting) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    return loop(
        wrapped,
        optimizer,
        setting,
        autocast=setting.bf16,
        sync=lambda last: contextlib.nullcontext() if last else wrapped.no_sync(),
    )


def fsdp2_with(
    model: Any, setting: Setting, prepare: Callable[[Any], object], *, reshard: bool = True
) -> Step:
    """FSDP2, block by block; `prepare(model)` comes once it is cut."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low) if setting.bf16 else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mp_policy=policy, reshard_after_forward=reshard)
    prepare(model)

    def sync(last: bool) -> contextlib.AbstractContextManager[None]:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    return loop(model, adamw(model.parameters()), setting, sync=sync if setting.accumulate > 1 else None)


@contender
def fsdp2_keep(model: nn.Module, setting: Setting) -> Step:
    return fsdp2_with(model, setting, lambda cut: None, reshard=False)


@contender
def fsdp2_reshard(model: nn.Module, setting: Setting) -> Step:
    return fsdp2_with(model, setting, lambda cut: None)


def _deepspeed(model: nn.Module, setting: Setting, stage: int) -> Step:
    if importlib.util.find_spec("deepspeed") is None:
        raise Absent("deepspeed is not installed")
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.accumulate,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": setting.bf16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, optimizer=adamw(model.parameters())
    )

    def step(batches: Batches) -> None:
        for ids, labels in batches:
            engine.backward(engine(ids, labels))
            engine.step()

    return step


@contender
def deepspeed_1(model: nn.Module, setting: Setting) -> Step:
    return _deepspeed(model, setting, 1)


@contender
def deepspeed_2(model: nn.Module, setting: Setting) -> Step:
    return _deepspeed(model, setting, 2)


@contender
def deepspeed_3(model: nn.Module, setting: Setting) -> Step:
    return _deepspeed(model, setting, 3)
