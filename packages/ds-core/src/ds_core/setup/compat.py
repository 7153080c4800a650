"""`initialize(...)`: a DeepSpeed config and a model in, the engine and its friends out."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.mesh import Mesh, Topology
from ds_core.ground.settings import Origin
from ds_core.setup import plugins
from ds_core.setup.deepspeed_engine import DeepSpeedEngine
from ds_core.setup.deepspeed_json import explain, translate
from ds_core.setup.deepspeed_wire import build_routes
from ds_core.setup.estimate import Count, Recipe, check_fits
from ds_core.setup.named import build_optimizer, build_scheduler
from ds_core.setup.plan import Named, Plan
from ds_core.setup.progress import make_audible
from ds_core.setup.source import Source
from ds_core.state.owner import FlatOwner, ReplicatedOwner
from ds_core.state.store import Store
from ds_core.train.engine import Sink
from ds_core.train.optim import ShardedOptimizer, cut_for, cut_of_model
from ds_core.train.recompute import checkpoint_blocks
from ds_core.train.sampler import ResumableLoader, ResumableSampler
from ds_core.train.schedule import saveable

_log = logging.getLogger("ds_core")
_JOB = Origin("derived", "the ranks of this job")

Initialized = tuple[DeepSpeedEngine, Optimizer, ResumableLoader | None, Any]


def initialize(  # noqa: PLR0913 - the signature is DeepSpeed's
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
    mesh_param: Sequence[int] | None = None,
    config_params: Source | None = None,
) -> Initialized:
    """Build (engine, optimizer, dataloader, lr_scheduler) from a DeepSpeed config, unchanged.

    The config is a dict, a path, JSON or base64, and may come as `config`, `config_params` or
    `args.deepspeed_config`. An optimizer or scheduler given in code wins over the config's, with a message;
    either may be a function of the parameters or of the optimizer. Without a launcher this is one process.
    The model is changed in place, the optimizer comes back as the object it was. Collective.
    Raises: ConfigError with every problem of the config, LookupError for a missing package, DoesNotFit.
    """
    if model is None:
        raise ValueError("no model given; allowed: initialize(model=..., config=...)")
    _refuse_parallel(mpu, mesh_param)
    source = _source(args, config, config_params)
    mesh = _join(distributed_port, dist_init_required)
    plan = translate(source, world=mesh.world, auto={"dtype": _model_dtype(model)}, world_origin=_JOB)
    if plan.node_ranks is not None:
        mesh = Topology(dp_replicate=-1, dp_shard=plan.node_ranks).build(mesh.accelerator)
    make_audible(plan.reporting)
    if plan.reporting.comms is not None:
        plugins.look_up("comm_log", "wire")(mesh, **plan.reporting.comms.options())
    for notice in plan.notices:
        _log.info(notice)
    if plan.disable_python_gc:
        gc.disable()
    inner = _optimizer(plan, optimizer, list(model_parameters or model.parameters()))
    _check_memory(plan, model, inner, mesh)
    store = _store(plan, model, mesh)
    if plan.cpu_checkpointing:
        _keep_activations_on_host(model, mesh)
    owner = _owner(plan, model, inner, mesh, store)
    sharded = ShardedOptimizer(inner, owner)
    scheduler = _scheduler(plan, lr_scheduler, inner)
    loader = _loader(plan, training_data, collate_fn, mesh)
    engine = DeepSpeedEngine(
        model, owner, sharded, plan, scheduler=scheduler, sink=_sink(plan), loader=loader
    )
    if plan.reporting.dump_state and engine.global_rank == 0:
        for row in explain(plan):
            _log.info("%s = %r (%s): %s", row.key, row.value, row.source, row.acts)
    return engine, inner, loader, scheduler


# -- what was given ------------------------------------------------------------------------------------------


def _refuse_parallel(mpu: Any, mesh_param: Sequence[int] | None) -> None:
    if mpu is not None:
        raise ValueError("given mpu; model parallelism needs ds-pipe: leave it out, or pip install ds-pipe")
    if mesh_param is not None and (len(mesh_param) != 2 or mesh_param[1] != 1):
        raise ValueError(
            f"given mesh_param {tuple(mesh_param)}; allowed: (data, 1); sequence parallelism needs ds-pipe"
        )


def _source(args: Any, config: Source | None, config_params: Source | None) -> Source:
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    found = {name: source for name, source in given.items() if source is not None}
    if not found:
        raise ValueError(f"no config given; allowed: {', '.join(given)}, such as config='ds_config.json'")
    if len(found) > 1:
        raise ValueError(f"config given as {' and as '.join(found)}; keep one of them")
    return next(iter(found.values()))


def _join(port: int, required: bool | None) -> Mesh:
    """The mesh over all ranks of the job that the environment describes; one process without any."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if required is False and launched and not dist.is_initialized():
        raise ValueError(
            "dist_init_required=False, but torch.distributed is not initialised and WORLD_SIZE is"
            f" {os.environ['WORLD_SIZE']}; call init_process_group first, or leave the argument out"
        )
    if launched:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(port))
    accelerator = Accelerator.current()
    accelerator.activate()
    return Topology().build(accelerator)


def _model_dtype(model: nn.Module) -> str | None:
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, None)
    return None if dtype is None else str(dtype)


# -- what is built -------------------------------------------------------------------------------------------


def _optimizer(plan: Plan, given: Any, params: list[Any]) -> Optimizer:
    if given is None:
        if plan.optimizer is None:
            raise ValueError(
                'no optimizer given; allowed: initialize(optimizer=...), or "optimizer" in the config'
            )
        return build_optimizer(plan.optimizer, params)
    made: Any = given if isinstance(given, Optimizer) else given(params)
    if not isinstance(made, Optimizer):
        raise ValueError(f"the optimizer is a {type(made).__name__}; it must be a torch.optim.Optimizer")
    _say_code_wins("optimizer", made, plan.optimizer)
    if not plan.allow_untested_optimizer and cut_for(made) != "flat":
        raise ValueError(
            f"{type(made).__name__} is not known to be element-wise, and zero_allow_untested_optimizer is"
            " false; set it to true, or declare `elementwise = True` on the class if it is"
        )
    return made


def _scheduler(plan: Plan, given: Any, optimizer: Optimizer) -> Any:
    if given is None:
        return build_scheduler(plan.scheduler, optimizer) if plan.scheduler else None
    made = given if hasattr(given, "step") else given(optimizer)
    _say_code_wins("scheduler", made, plan.scheduler)
    return saveable(made)


def _say_code_wins(what: str, made: Any, planned: Named | None) -> None:
    if planned is not None:
        _log.warning(
            "%s: the %s given in code is used, not the config's %s", what, type(made).__name__, planned.type
        )


def _check_memory(plan: Plan, model: nn.Module, optimizer: Optimizer, mesh: Mesh) -> None:
    """Raises DoesNotFit before any weight is touched. What the model holds already counts as free."""
    accelerator = mesh.accelerator
    here = sum(p.numel() * p.element_size() for p in model.parameters() if p.device == accelerator.device)
    if plan.offload is not None:
        return  # what lives elsewhere is not counted here
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.is_cpu else 1
    states = {"SGD": 0, "Adam": 2, "AdamW": 2}.get(type(optimizer).__name__, 0)
    check_fits(
        Count.of(model),
        ranks=mesh.size("data" if plan.zero.secondary_shard else "dp_shard"),
        stage=plan.stage,
        available=accelerator.free_bytes() / sharing + here,
        recipe=Recipe(plan.dtype, states=states),
    )


def _owner(plan: Plan, model: nn.Module, optimizer: Optimizer, mesh: Mesh, store: Store | None) -> FlatOwner:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(mesh.accelerator.device)
    routes = _routes(plan, optimizer)
    if plan.stage > 0:
        spec = {**plan.owner_spec(), "cut": cut_of_model(model, optimizer)}
        sharded: FlatOwner = plugins.resolve("owner", spec).shard(model, mesh, store=store, **routes)
        return sharded
    dtype = None if plan.dtype == "float32" else getattr(torch, plan.dtype)
    chosen = {name: getattr(plan.zero, name) for name in ("bucket_numel", "overlap", "keep_fp32")}
    options = {name: value for name, value in chosen.items() if value is not None}
    return ReplicatedOwner(model, mesh, dtype=dtype, store=store, **options, **routes)


def _routes(plan: Plan, optimizer: Optimizer) -> dict[str, Any]:
    """How gradients ("reduce") and parameters ("gather") travel, by the file or by the optimizer."""
    routes: dict[str, Any] = {} if plan.wire is None else build_routes(plan.wire)
    own = getattr(optimizer, "route", None)
    if own is not None and "reduce" in routes:
        raise ValueError(
            f"zero_quantized_gradients and {type(optimizer).__name__} each say how gradients travel: leave "
            "the key out, or take another optimizer"
        )
    return routes if own is None else {**routes, "reduce": own}


def _store(plan: Plan, model: nn.Module, mesh: Mesh) -> Store | None:
    """Raises LookupError naming ds-offload when it is not installed."""
    if plan.offload is None:
        return None
    ranks = mesh.size("data" if plan.zero.secondary_shard else "dp_shard") if plan.stage else 1
    numel = sum(param.numel() for param in model.parameters())
    store: Store = plugins.resolve("store", plan.offload.spec(-(-numel // ranks)))
    return store


def _keep_activations_on_host(model: nn.Module, mesh: Mesh) -> None:
    pinned = not mesh.accelerator.is_cpu
    checkpoint_blocks(model, keep=partial(torch.autograd.graph.save_on_cpu, pin_memory=pinned))


def _loader(
    plan: Plan, data: Dataset[Any] | None, collate_fn: Callable[[list[Any]], Any] | None, mesh: Mesh
) -> ResumableLoader | None:
    if data is None:
        return None
    if not hasattr(data, "__len__"):
        raise ValueError(
            f"training_data is a {type(data).__name__} without a length; give a map-style dataset, or iterate"
            " over your own DataLoader"
        )
    sampler = ResumableSampler(
        len(data),
        plan.micro_batch_size,
        rank=mesh.rank("data"),
        world=mesh.size("data"),
        accumulate=plan.accumulate,
        tail="drop" if plan.drop_last else "pad",
    )
    return ResumableLoader(data, sampler, collate_fn=collate_fn, pin_memory=not mesh.accelerator.is_cpu)


def _sink(plan: Plan) -> Sink | None:
    if not plan.reporting.sinks:
        return None
    for sink in plan.reporting.sinks:
        if "path" in sink:
            Path(sink["path"]).parent.mkdir(parents=True, exist_ok=True)
    made: Sink = plugins.look_up("metrics", "log")(plan.reporting.sinks)
    return made
