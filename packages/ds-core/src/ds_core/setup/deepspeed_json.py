"""A DeepSpeed config file -> a frozen Plan; nothing in it is ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_core.ground.settings import Origin, Setting
from ds_core.setup.batch import ACCUMULATE, MICRO, TRAIN, Batch, solve_batch
from ds_core.setup.config import ConfigError, Problem, merge
from ds_core.setup.deepspeed_comms import plan_comms
from ds_core.setup.deepspeed_keys import GATES, ROWS
from ds_core.setup.deepspeed_offload import plan_offload
from ds_core.setup.deepspeed_wire import plan_wire
from ds_core.setup.findings import DEFAULT, Findings, walk, with_aliases
from ds_core.setup.named import plan_optimizer, plan_scheduler
from ds_core.setup.plan import LossScale, Named, Plan, Reporting, Zero
from ds_core.setup.readers import DTYPES, as_number, whole
from ds_core.setup.source import Source, read_layer

WORLD = Origin("code", "world size")
NOT_DERIVABLE = 'given "auto"; it cannot be derived: give a value, or pass one for it in code'

# Larger buckets than this only delay the first reduction; ds_zero's own default.
_BUCKET_NUMEL = 1_000_000


def translate(
    *sources: Source, world: int = 1, auto: Mapping[str, Any] | None = None, world_origin: Origin = WORLD
) -> Plan:
    """The Plan that the sources come to together, later ones winning.

    `auto` holds values for keys that say "auto", by dotted key ("optimizer.params.lr"), and "dtype", the
    dtype of the model's parameters. Raises ConfigError with every problem in the files at once.
    """
    tree, origins = merge([with_aliases(read_layer(source)) for source in sources])
    found = Findings(origins, dict(auto or {}))
    walk(tree, "", found)
    plan = _derive(found, world, world_origin)
    if found.problems:
        raise ConfigError("DeepSpeed config", found.problems)
    assert plan is not None
    return plan


def explain(plan: Plan) -> list[Setting]:
    """Every key: what it came to, where it was written, where it acts. The rest is "default"."""
    return list(plan.keys)


def _derive(found: Findings, world: int, world_origin: Origin) -> Plan | None:
    """What follows from several keys together. Notes problems; None when there is no plan to be made."""
    batch = _batch(found, world, world_origin)
    dtype, autocast = _precision(found)
    optimizer = _optimizer(found)
    scheduler = _scheduler(found, optimizer.params.get("lr") if optimizer else None)
    stage = found.get("zero_optimization.stage")
    kept = found.get("data_types.grad_accum_dtype")
    if stage == 0 and kept not in (None, "float32"):
        found.add(
            "data_types.grad_accum_dtype",
            f"given {kept}, but stage 0 keeps gradients in fp32; leave it out, or use stage 1",
        )
    node_ranks = _node_ranks(found, stage, world)
    offload = plan_offload(found, stage, dtype)
    skips = "float16" in (dtype, autocast) or found.get("bf16.check_grad_overflow") is True
    wire = plan_wire(found, stage, skips=skips)
    if found.problems or batch is None:
        return None
    plan = Plan(
        world=world,
        train_batch_size=batch.train,
        micro_batch_size=batch.micro,
        accumulate=batch.accumulate,
        stage=stage,
        dtype=dtype,
        autocast=autocast,
        cast_inputs=found.get("fp16.auto_cast") and dtype == "float16",
        loss_scale=_loss_scale(found, dtype, autocast),
        skip_overflow=dtype == "bfloat16" and found.get("bf16.check_grad_overflow") is True,
        max_norm=found.get("gradient_clipping") or None,
        zero=_zero(found, stage),
        offload=offload,
        wire=wire,
        cpu_checkpointing=found.get("activation_checkpointing.cpu_checkpointing"),
        node_ranks=node_ranks,
        optimizer=optimizer,
        scheduler=scheduler,
        reporting=_reporting(found),
        drop_last=found.get("dataloader_drop_last"),
        tag_validation=found.get("checkpoint.tag_validation"),
        disable_python_gc=found.get("disable_python_gc"),
        allow_untested_optimizer=found.get("zero_allow_untested_optimizer"),
        notices=tuple(_notices(found)),
    )
    return plan.model_copy(update={"keys": tuple(_key_rows(found, plan))})


def _batch(found: Findings, world: int, world_origin: Origin) -> Batch | None:
    wrong = {problem.key for problem in found.problems}
    names = (TRAIN, MICRO, ACCUMULATE)
    if wrong & set(names):
        return None
    sizes = {name: (found.values[name], found.source(name)) for name in names if found.given(name)}
    batch, problem = solve_batch(sizes, world, world_origin)
    if problem:
        found.problems.append(problem)
    given = found.get("data_parallel_size")
    if given not in (None, world):
        found.add("data_parallel_size", f"given {given}, but there are {world} ranks; leave it out")
    return batch


def _precision(found: Findings) -> tuple[Any, Any]:
    """(dtype of parameters and arithmetic, dtype of autocast or None)."""
    for key, dtype in (("fp16.enabled", "float16"), ("bf16.enabled", "bfloat16")):
        if not found.given(key) and key in found.sources:  # it said auto
            model = DTYPES.get(str(found.auto.get("dtype")))
            found.values[key] = model == dtype
            found.sources[key] = Origin("derived", f"auto, the model is {model or 'of unknown dtype'}")
    fp16, bf16 = found.get("fp16.enabled"), found.get("bf16.enabled")
    autocast = found.get("torch_autocast.enabled")
    on = [key for key, value in (("fp16", fp16), ("bf16", bf16), ("torch_autocast", autocast)) if value]
    if len(on) > 1:
        given = ", ".join(f"{name}.enabled ({found.source(f'{name}.enabled')})" for name in on)
        found.add(f"{on[0]}.enabled", f"only one precision at a time, given {given}; switch all but one off")
    dtype = "float16" if fp16 else "bfloat16" if bf16 else "float32"
    wire = found.get("torch_autocast.dtype") or "bfloat16"
    for key in ("data_types.param_dtype", "communication_data_type"):
        if found.get(key) not in (None, dtype):
            section = on[0] if on else "no precision section"
            found.add(
                key,
                f"given {found.get(key)}, but the compute dtype is {dtype} (from {section}); leave it out, or"
                " switch that precision on; other wire formats need ds-comm",
            )
    return dtype, wire if autocast else None


def _loss_scale(found: Findings, dtype: str, autocast: str | None) -> LossScale | None:
    if "float16" not in (dtype, autocast):
        return None
    static = found.get("fp16.loss_scale") if dtype == "float16" else 0.0
    return LossScale(
        static=static or None,
        initial=2.0 ** found.get("fp16.initial_scale_power"),
        window=found.get("fp16.loss_scale_window"),
        hysteresis=found.get("fp16.hysteresis"),
        consecutive_hysteresis=found.get("fp16.consecutive_hysteresis"),
        minimum=float(found.get("fp16.min_loss_scale")),
    )


def _zero(found: Findings, stage: int) -> Zero:
    def key(name: str) -> str:
        return f"zero_optimization.{name}"

    buckets = [found.values.get(key(name)) for name in ("reduce_bucket_size", "allgather_bucket_size")]
    bucket = min((size for size in buckets if size is not None), default=_BUCKET_NUMEL)
    live = found.get(key("stage3_max_live_parameters"))
    prefetch = min(found.get(key("stage3_prefetch_bucket_size")), live)
    keep = min(found.get(key("stage3_max_reuse_distance")), live)
    return Zero(
        grad_dtype=found.get("data_types.grad_accum_dtype"),
        keep_fp32=tuple(f"*.{name}" for name in found.get("data_types.keep_in_fp32_modules")) or None,
        bucket_numel=bucket if bucket < _BUCKET_NUMEL else None,
        prefetch_numel=prefetch if stage == 3 else None,
        keep_numel=keep if stage == 3 else None,
        persist_numel=found.get(key("stage3_param_persistence_threshold")) if stage == 3 else None,
        leaves=_leaves(found) or None,
        secondary_shard=found.get(key("zero_hpz_partition_size")) > 1 or None,
        overlap=found.get(key("overlap_comm")),
    )


def _leaves(found: Findings) -> tuple[str, ...]:
    names = found.get("zero_optimization.leaf_module.names")
    return (*names, *(f"*{suffix}" for suffix in found.get("zero_optimization.leaf_module.name_suffixes")))


def _node_ranks(found: Findings, stage: int, world: int) -> int | None:
    """How many ranks shard among them (MiCS), or keep a second shard among them (hpZ); None: all or none."""
    mics, hpz = (f"zero_optimization.{name}" for name in ("mics_shard_size", "zero_hpz_partition_size"))
    sizes = {key: size for key, off in ((mics, -1), (hpz, 1)) if (size := found.get(key)) != off}
    if len(sizes) == 2:
        found.add(mics, "both this and zero_hpz_partition_size say how nodes are cut; keep one of them")
    for key, size in sizes.items():
        if size == 0 or world % size or (key == hpz and size == world):
            below = " that is smaller" if key == hpz else ""
            found.add(key, f"given {size}; allowed: a divisor of the {world} ranks{below}")
        elif stage < (3 if key == hpz else 1):
            found.add(key, f"given {size}, which has no effect at stage {stage}")
        elif size < world:
            return int(size)
    return None


def _optimizer(found: Findings) -> Named | None:
    params = found.get("optimizer.params")
    if not found.given("optimizer.type"):
        if params:
            found.add("optimizer.type", 'needed when there are "optimizer.params", but not given')
        return None
    wanted = _fill(found, "optimizer.params", params, {}, numbers=("lr", "eps", "weight_decay", "momentum"))
    named, problems = plan_optimizer(found.get("optimizer.type"), wanted)
    found.problems += [Problem(p.key, p.message, found.origin(p.key)) for p in problems]
    return named


def _scheduler(found: Findings, optimizer_lr: float | None) -> Named | None:
    params = found.get("scheduler.params")
    if not found.given("scheduler.type"):
        if params:
            found.add("scheduler.type", 'needed when there are "scheduler.params", but not given')
        return None
    derivable = {"warmup_max_lr": optimizer_lr, "warmup_min_lr": 0.0}
    wanted = _fill(found, "scheduler.params", params, derivable, numbers=("warmup_max_lr", "warmup_min_lr"))
    named, problems = plan_scheduler(found.get("scheduler.type"), wanted)
    found.problems += [Problem(p.key, p.message, found.origin(p.key)) for p in problems]
    return named


def _fill(
    found: Findings,
    section: str,
    params: Mapping[str, Any],
    derivable: Mapping[str, Any],
    *,
    numbers: Sequence[str],
) -> dict[str, Any]:
    """The section with every "auto" replaced, and numbers that were written as strings read."""
    filled: dict[str, Any] = {}
    for name, value in params.items():
        key = f"{section}.{name}"
        if value == "auto":
            value = found.auto.get(key, derivable.get(name))
        if value in (None, "auto") and params[name] == "auto":
            found.add(key, NOT_DERIVABLE)
            continue
        try:
            if name.endswith("num_steps"):
                value = whole(1)(value)
            elif isinstance(value, str) and name in numbers:
                value = as_number(value)
        except ValueError as error:
            found.add(key, str(error))
            continue
        filled[name] = value
    return filled


def _reporting(found: Findings) -> Reporting:
    return Reporting(
        steps_per_print=found.get("steps_per_print"),
        wall_clock_breakdown=found.get("wall_clock_breakdown"),
        throughput=found.get("timers.throughput.enabled"),
        synchronize=found.get("timers.throughput.synchronized"),
        dump_state=found.get("dump_state"),
        log_level=found.get("log_level"),
        sinks=tuple(_sinks(found)),
        comms=plan_comms(found),
    )


def _sinks(found: Findings) -> Sequence[Mapping[str, Any]]:
    sinks: list[Mapping[str, Any]] = []
    for section in ("csv_monitor", "tensorboard"):
        if found.get(f"{section}.enabled"):
            folder = found.get(f"{section}.output_path") or section
            run = Path(folder, found.get(f"{section}.job_name"))
            csv = section == "csv_monitor"
            sinks.append(
                {"type": "csv", "path": f"{run}.csv"} if csv else {"type": section, "folder": str(run)}
            )
    if found.get("wandb.enabled"):
        names = {"project": "project", "group": "group", "team": "entity"}
        options = {new: found.get(f"wandb.{old}") for old, new in names.items()}
        sinks.append({"type": "wandb", **{name: value for name, value in options.items() if value}})
    return sinks


def _notices(found: Findings) -> Sequence[str]:
    size = found.get("vocabulary_size")
    odd = (
        [f"vocabulary_size {size} is no multiple of 8, which tensor cores want"] if size and size % 8 else []
    )
    return [*found.notices, *odd]


def _key_rows(found: Findings, plan: Plan) -> Sequence[Setting]:
    solved = {TRAIN: plan.train_batch_size, MICRO: plan.micro_batch_size, ACCUMULATE: plan.accumulate}
    shown = {row.key for row in found.rows}
    rows = []
    for key, row in ROWS.items():
        if row.kind != "works" or key in shown:
            continue
        source = found.source(key) if found.given(key) else DEFAULT
        if key in solved and not found.given(key):
            source = Origin("derived", "from the batch equation")
        idle = f"not at stage {plan.stage}: " if ".stage3_" in key and plan.stage != 3 else ""
        idle = idle or _closed(found, key) or _unused(key, plan)
        rows.append(Setting(key, solved.get(key, found.get(key)), source, idle + row.acts, not idle))
    return [*rows, *found.rows]


def _unused(key: str, plan: Plan) -> str:
    """Why a key that says how state travels does nothing; empty where some does."""
    offload = plan.offload
    if key.startswith("aio.") and (offload is None or offload.nvme is None):
        return "nothing is on nvme: "
    if key == "zero_optimization.sub_group_size" and (offload is None or offload.masters == "device"):
        return "the optimizer's state is on the device: "
    return ""


def _closed(found: Findings, key: str) -> str:
    """Why a key of a section that is switched off does nothing; empty where it does something."""
    section, _, name = key.rpartition(".")
    gate = GATES.get(section)
    if gate is None or name == gate or f"{section}.{gate}" not in ROWS:
        return ""
    return "" if found.get(f"{section}.{gate}") else f"off, since {section}.{gate} is: "
