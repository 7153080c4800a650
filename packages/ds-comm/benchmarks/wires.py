"""The contenders of network.py: those of ds-zero's step benchmark that send, and those that send less."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contenders import (
    Absent,
    Setting,
    Step,
    adamw,
    ddp,
    ddp_with,
    fsdp2_reshard,
    fsdp2_with,
    loop,
    no_communication,
)
from torch import nn

from ds_core import ReplicatedOwner, ShardedOptimizer, Topology
from ds_core.ground.collectives import WireLog

Build = Callable[[nn.Module, Setting], "Entry"]


@dataclass(frozen=True)
class Entry:
    """One contender, ready to step."""

    step: Step
    log: WireLog | None = None  # of ours
    warmup: int = 0  # steps before it does what it is here for
    period: int = 1  # steps after which its traffic repeats


CONTENDERS: dict[str, Build] = {}


def contender(name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        CONTENDERS[name] = build
        return build

    return register


# -- peers ---------------------------------------------------------------------------------------------------

CONTENDERS["no communication"] = lambda model, setting: Entry(no_communication(model, setting))
CONTENDERS["DDP"] = lambda model, setting: Entry(ddp(model, setting))


@contender("DDP, fp16 hook")
def ddp_fp16(model: nn.Module, setting: Setting) -> Entry:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return Entry(ddp_with(model, setting, lambda ddp: ddp.register_comm_hook(None, fp16_compress_hook)))


def _powersgd(model: nn.Module, setting: Setting, rank: int) -> Entry:
    """Vogels et al., "PowerSGD", 2019, as torch has it: full gradients in the first two steps.

    All in one bucket: the hook issues its later collectives from callbacks, and those of two buckets meet
    gloo in an order that differs between ranks, which ends the job.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

    state = hooks.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    step = ddp_with(
        model, setting, lambda ddp: ddp.register_comm_hook(state, hooks.powerSGD_hook), bucket_mb=1024
    )
    return Entry(step, warmup=3)


CONTENDERS["DDP, PowerSGD rank 1"] = lambda model, setting: _powersgd(model, setting, 1)
CONTENDERS["DDP, PowerSGD rank 4"] = lambda model, setting: _powersgd(model, setting, 4)
CONTENDERS["FSDP2"] = lambda model, setting: Entry(fsdp2_reshard(model, setting))

# -- ours ----------------------------------------------------------------------------------------------------


def _comm() -> Any:
    try:
        import ds_comm
    except ImportError:
        raise Absent("ds-comm is not installed") from None
    return ds_comm


def _named(name: str) -> Any:
    """A public name of ds_comm. Raises Absent where this version has none of it."""
    try:
        return getattr(_comm(), name)
    except AttributeError:
        raise Absent(f"this ds-comm has no {name}") from None


def _zero(
    model: nn.Module,
    setting: Setting,
    stage: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    hpz: bool = False,
    gather: Any = None,
    reduce: Any = None,
    warmup: int = 0,
) -> Entry:
    """ZeRO over all ranks; with `hpz` the second shard of each node, where nodes have several ranks."""
    from ds_zero import Zero

    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = setting.world // per_node
    second = hpz and nodes > 1 and per_node > 1
    mesh = (Topology(dp_replicate=nodes, dp_shard=per_node) if second else Topology()).build()
    optimizer = optimizer or adamw(model.parameters())
    dtype = "bfloat16" if setting.bf16 else None
    zero = Zero(stage=stage, dtype=dtype, secondary_shard=second)
    ShardedOptimizer(optimizer, zero.shard(model, mesh, gather=gather, reduce=reduce))
    return Entry(loop(model, optimizer, setting), mesh.log, warmup)


def _whole(
    model: nn.Module,
    setting: Setting,
    optimizer: torch.optim.Optimizer,
    reduce: Any,
    *,
    warmup: int = 0,
    period: int = 1,
) -> Entry:
    """Stage 0: everything on every rank."""
    mesh = Topology().build()
    owner = ReplicatedOwner(model, mesh, dtype=torch.bfloat16 if setting.bf16 else None, reduce=reduce)
    ShardedOptimizer(optimizer, owner)
    return Entry(loop(model, optimizer, setting), mesh.log, warmup, period)


CONTENDERS["ours, stage 0"] = lambda m, s: _whole(m, s, adamw(m.parameters()), None)
CONTENDERS["ours, ZeRO-2"] = lambda m, s: _zero(m, s, 2)
CONTENDERS["ours, ZeRO-3"] = lambda m, s: _zero(m, s, 3)
CONTENDERS["ours, stage 0, int8"] = lambda m, s: _whole(m, s, adamw(m.parameters()), _named("Int8")())
CONTENDERS["ours, stage 0, int4"] = lambda m, s: _whole(m, s, adamw(m.parameters()), _named("Int4")())
CONTENDERS["ours, ZeRO-2, int8"] = lambda m, s: _zero(m, s, 2, reduce=_named("Int8")())
CONTENDERS["ours, ZeRO-2, int4"] = lambda m, s: _zero(m, s, 2, reduce=_named("Int4")())


@contender("ours, 1-bit Adam")
def onebit_adam(model: nn.Module, setting: Setting) -> Entry:
    """In its compressed phase: two steps of plain Adam come before."""
    optimizer = _named("OnebitAdam")(model.parameters(), lr=1e-4, freeze_step=2)
    return _whole(model, setting, optimizer, optimizer.route, warmup=3)


@contender("ours, 1-bit Adam, ZeRO-2")
def onebit_adam_2(model: nn.Module, setting: Setting) -> Entry:
    optimizer = _named("OnebitAdam")(model.parameters(), lr=1e-4, freeze_step=2)
    return _zero(model, setting, 2, optimizer=optimizer, reduce=optimizer.route, warmup=3)


def _zero_one(model: nn.Module, setting: Setting, interval: int) -> Entry:
    """In its last phase: ranks step alone, and meet every `interval` steps."""
    schedule = _named("ZeroOneSchedule")(2, local_step_scaler=1, local_step_clipper=interval)
    optimizer = _named("ZeroOneAdam")(model.parameters(), lr=1e-4, schedule=schedule)
    # Two steps with plain gradients, one with signs; from there on `interval` steps hold one meeting.
    return _whole(model, setting, optimizer, optimizer.route, warmup=3, period=interval)


CONTENDERS["ours, 0/1 Adam, every 4th"] = lambda m, s: _zero_one(m, s, 4)
CONTENDERS["ours, 0/1 Adam, every 16th"] = lambda m, s: _zero_one(m, s, 16)


@contender("ours, ZeRO++")
def zeropp(model: nn.Module, setting: Setting) -> Entry:
    """qwZ in int8, qgZ in int4 over two hops, and hpZ where nodes have several ranks."""
    gather = _named("QuantizedWeights")(_named("Int8")())
    reduce = _named("TwoHop")(_named("Int4")(), _named("Int4")())
    return _zero(model, setting, 3, hpz=True, gather=gather, reduce=reduce)


@contender("ours, ZeRO-2, Delta, LoCo")
def delta_loco(model: nn.Module, setting: Setting) -> Entry:
    """Both ways in int4, and nothing lost for good either way."""
    int4 = _named("Int4")
    reduce = _named("LoCo")(_named("TwoHop")(int4(), int4()))
    return _zero(model, setting, 2, gather=_named("Delta")(int4()), reduce=reduce)


# -- ours in theirs ------------------------------------------------------------------------------------------


@contender("DDP, our 1-bit hook")
def ddp_onebit(model: nn.Module, setting: Setting) -> Entry:
    """Gradients as signs, with error feedback on both hops."""
    onebit = _named("OneBit")()
    from ds_comm.bridges.ddp import CodedHook, coded_hook

    mesh = Topology().build()

    def register(wrapped: Any) -> None:
        hook = CodedHook(wrapped, onebit, error_feedback=True, mesh=mesh)
        wrapped.register_comm_hook(hook, coded_hook)

    return Entry(ddp_with(model, setting, register), mesh.log)


@contender("FSDP2, our int8 and int4")
def fsdp2_coded(model: nn.Module, setting: Setting) -> Entry:
    gather, reduce = _named("Int8")(), _named("Int4")()
    from ds_comm.bridges.fsdp2 import use_codecs

    mesh = Topology().build()
    step = fsdp2_with(model, setting, lambda cut: use_codecs(cut, gather=gather, reduce=reduce, mesh=mesh))
    return Entry(step, mesh.log)
