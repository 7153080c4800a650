"""The table of DeepSpeed's config keys: what each does here, or why it is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_core.setup.deepspeed_loco import as_loco
from ds_core.setup.deepspeed_zenflow import as_zenflow
from ds_core.setup.readers import (
    Reader,
    anything,
    as_bool,
    as_dtype,
    as_mapping,
    as_names,
    as_stage,
    as_text,
    at_least,
    comm_ops,
    one_of,
    or_null,
    share,
    whole,
)

Kind = Literal["works", "always", "no effect", "refused"]


@dataclass(frozen=True, slots=True)
class Row:
    """One key. `works`: see `acts`. `always`: how it is done here, so only `only` is accepted.
    `no effect`: any proper value is accepted, `why` it changes nothing. `refused`: `why`, or the package.
    """

    key: str
    kind: Kind
    read: Reader = anything
    default: Any = None
    acts: str = ""
    only: tuple[Any, ...] = ()
    why: str = ""
    package: str | None = None
    auto: Literal["default", "derived", "no"] = "no"


def _works(key: str, read: Reader, default: Any, acts: str, auto: str = "no") -> Row:
    return Row(key, "works", read, default, acts, auto=auto)  # type: ignore[arg-type]


def _always(key: str, only: Any, why: str, package: str | None = None) -> Row:
    values = only if isinstance(only, tuple) else (only,)
    return Row(key, "always", default=values[0], only=values, why=why, package=package)


def _moot(key: str, read: Reader, default: Any, why: str) -> Row:
    return Row(key, "no effect", read, default, why=why, auto="default")


def _refused(key: str, why: str, package: str | None = None) -> Row:
    return Row(key, "refused", why=why, package=package)


_count = whole(1)
_size = whole(0)
_ENGINE = "Engine"
_MESH = "parallelism is a mesh axis, set up in code"
_BUFFERS = "units are fetched straight into their own buffers, Zero(prefetch_numel) elements ahead"
_PINNED = "host memory is pinned where the device is a GPU, and where it is not there is nothing to pin for"
_PIPELINED = "chunks are always read ahead and written behind the update"
_device = or_null(one_of("none", "cpu", "nvme"))

_TOP = (
    _works("train_batch_size", _count, None, "sampler, Engine(accumulate)", "derived"),
    _works("train_micro_batch_size_per_gpu", _count, None, "sampler", "derived"),
    _works("gradient_accumulation_steps", _count, None, "Engine(accumulate)", "derived"),
    _always("managed_gradient_accumulation", True, "the boundary is counted by the engine; to set it yourself"
            " use ds_zero.shard(model, optimizer), where optimizer.step() is the boundary"),
    _works("optimizer.type", as_text, None, "optimizer, unless one is given in code"),
    _works("optimizer.params", as_mapping, {}, "optimizer"),
    _always("optimizer.legacy_fusion", False, "there is one optimizer path for all stages"),
    _works("scheduler.type", as_text, None, "learning rate, unless a scheduler is given in code"),
    _works("scheduler.params", as_mapping, {}, "learning rate"),
    _works("steps_per_print", or_null(_count), None, "progress lines of the log", "default"),
    _works("dump_state", as_bool, False, "this table is logged at the start"),
    _works("disable_python_gc", as_bool, False, "initialize() switches collection off"),
    _always("disable_allgather", False, "parameters are always gathered whole"),
    _works("communication_data_type", or_null(as_dtype), None, "must be the compute dtype", "default"),
    _always("seq_parallel_communication_data_type", ("fp32", None), "sequence parallelism", "ds-pipe"),
    _always("prescale_gradients", False, "gradients are summed in the compute dtype and averaged in fp32"),
    _always("gradient_predivide_factor", (1.0,), "gradients are averaged after the sum"),
    _always("gradient_allreduce_op", "mean", "gradients are averaged; for their sum multiply the loss by the"
            " number of ranks"),
    _works("gradient_clipping", at_least(0), 1.0, "Engine(max_norm); 0 switches it off", "default"),
    _works("zero_allow_untested_optimizer", as_bool, True,
           "false: refuses optimizers in code that are not known to be element-wise"),
    _moot("zero_force_ds_cpu_optimizer", as_bool, True, "any optimizer steps on the host, chunk by chunk"),
    _works("vocabulary_size", or_null(_count), None, "a warning when it is no multiple of 8"),
    _works("wall_clock_breakdown", as_bool, False, "forward, backward and step times in the progress lines"),
    _always("memory_breakdown", False, "`ds estimate` prints what is planned,"
            " ds_core.Timeline(engine) what every step took"),
    _works("dataloader_drop_last", as_bool, False, "sampler: drop or pad the last global batch"),
    _works("log_level", or_null(one_of("debug", "info", "warning", "error", "critical")), None,
           "the ds_core and ds_zero loggers"),
    _always("use_data_before_expert_parallelism", False, "experts", "ds-moe"),
    _always("sequence_parallel_size", (1,), "sequence parallelism", "ds-pipe"),
    _works("data_parallel_size", or_null(_count), None, "must be the number of ranks", "derived"),
)  # fmt: skip

_PRECISION = (
    _works("fp16.enabled", as_bool, False, "compute dtype of the owner", "derived"),
    _works("fp16.auto_cast", as_bool, False, "engine: floating inputs are cast"),
    _works("fp16.loss_scale", at_least(0), 0.0, "StaticScale; 0 is DynamicScale", "default"),
    _works("fp16.initial_scale_power", _size, 16, "DynamicScale", "default"),
    _works("fp16.loss_scale_window", _count, 1000, "DynamicScale", "default"),
    _works("fp16.hysteresis", _count, 2, "DynamicScale", "default"),
    _works("fp16.consecutive_hysteresis", as_bool, False, "DynamicScale", "default"),
    _works("fp16.min_loss_scale", _count, 1, "DynamicScale", "default"),
    _always("fp16.fp16_master_weights_and_grads", False, "masters are fp32"),
    _works("bf16.enabled", as_bool, False, "compute dtype of the owner", "derived"),
    _moot("bf16.immediate_grad_update", as_bool, False, "gradients are reduced as they come, at every stage"),
    _works("bf16.check_grad_overflow", or_null(as_bool), None, "true: a step with infinite gradients is"
           " skipped; else it is an error that names the module"),
    _always("bf16.bf16_master_weights_and_grads", False, "masters are fp32"),
    _always("bf16.bf16_optimizer_states", False, "bf16 moments", "ds-offload"),
    _works("torch_autocast.enabled", as_bool, False, "engine: forward under torch.autocast"),
    _works("torch_autocast.dtype", or_null(as_dtype), None, "dtype of the autocast", "default"),
    _always("torch_autocast.lower_precision_safe_modules", (None,), "parameters keep their dtype;"
            " what torch.autocast lowers is its own list"),
    _works("data_types.grad_accum_dtype", or_null(as_dtype), None, "dtype gradients are kept in", "default"),
    _works("data_types.param_dtype", or_null(as_dtype), None, "must be the compute dtype", "default"),
    _always("data_types.buffer_dtype", (None,), "buffers are never cast"),
    _works("data_types.keep_in_fp32_modules", as_names, [], "Zero(keep_fp32): modules and parameters of these"
           " names, anywhere in the model", "default"),
)  # fmt: skip

_ZERO = (
    _works("stage", as_stage, 0, "ReplicatedOwner, or Zero(stage)"),
    _always("contiguous_gradients", True, "gradients are always collected in one flat bucket per unit"),
    _always("reduce_scatter", True, "gradients are always reduce-scattered"),
    _works("reduce_bucket_size", _count, None, "Zero(bucket_numel)", "default"),
    _works("allgather_bucket_size", _count, None, "Zero(bucket_numel)", "default"),
    _moot("use_multi_rank_bucket_allreduce", as_bool, True, "gradients are reduce-scattered instead"),
    _always("allgather_partitions", True, "parameters are gathered by all-gather"),
    _works("overlap_comm", or_null(as_bool), None, "Zero(overlap)", "default"),
    _moot("compute_grad_norm", as_bool, True, "the norm is one scalar per step, always reported"),
    _always("load_from_fp32_weights", True, "checkpoints hold fp32 masters"),
    _moot("elastic_checkpoint", as_bool, False, "every checkpoint loads at any world size and stage"),
    _works("offload_param.device", _device, None, "TieredStore(params)"),
    _works("offload_param.nvme_path", or_null(as_text), None, "TieredStore(nvme)"),
    _works("offload_param.max_in_cpu", _size, 10**9, "TieredStore(params): elements of a rank's shards that"
           " stay on the host", "default"),
    _moot("offload_param.buffer_count", _count, 5, _BUFFERS),
    _moot("offload_param.buffer_size", _size, 10**8, _BUFFERS),
    _moot("offload_param.pin_memory", as_bool, True, _PINNED),
    _works("offload_optimizer.device", _device, None, "TieredStore(masters, moments, grads)"),
    _works("offload_optimizer.nvme_path", or_null(as_text), None, "TieredStore(nvme)"),
    _works("offload_optimizer.ratio", share, 1.0, "TieredStore(masters, moments, grads): what leaves"),
    _works("offload_optimizer.super_offload", as_bool, False, 'TieredStore(update="speculative")'),
    _moot("offload_optimizer.buffer_count", _count, 4, "a chunk brings all its states at once"),
    _moot("offload_optimizer.pin_memory", as_bool, True, _PINNED),
    _moot("offload_optimizer.pipeline", as_bool, False, _PIPELINED),
    _moot("offload_optimizer.pipeline_read", as_bool, False, _PIPELINED),
    _moot("offload_optimizer.pipeline_write", as_bool, False, _PIPELINED),
    _moot("offload_optimizer.fast_init", as_bool, False, "state is made where it lives, whatever its size"),
    _moot("offload_optimizer.cpuadam_cores_perc", share, 0.8, "the update uses torch's threads of this rank"),
    _works("zenflow", as_zenflow, None, "TieredStore(zenflow)"),
    _works("sub_group_size", _count, 10**9, "TieredStore(chunk_numel)", "default"),
    _works("cpu_offload", or_null(as_bool), None, 'offload_optimizer.device = "cpu"'),
    _works("cpu_offload_param", or_null(as_bool), None, 'offload_param.device = "cpu"'),
    _moot("cpu_offload_use_pin_memory", as_bool, False, _PINNED),
    _works("stage3_prefetch_bucket_size", _size, 50_000_000, "Zero(prefetch_numel)", "default"),
    _works("stage3_param_persistence_threshold", _size, 100_000, "Zero(persist_numel)", "default"),
    _always("stage3_model_persistence_threshold", (sys.maxsize,), "the threshold is per parameter;"
            " lower stage3_param_persistence_threshold instead"),
    _works("stage3_max_live_parameters", _size, 10**9, "caps Zero(prefetch_numel, keep_numel)", "default"),
    _works("stage3_max_reuse_distance", _size, 10**9, "Zero(keep_numel)", "default"),
    _moot("stage3_gather_16bit_weights_on_model_save", as_bool, False, "save_16bit_model always streams"),
    _moot("stage3_gather_fp16_weights_on_model_save", as_bool, False, "save_16bit_model always streams"),
    _always("stage3_module_granularity_threshold", (0,), "units are the model's blocks"),
    _always("stage3_use_all_reduce_for_fetch_params", False, "parameters are fetched by all-gather"),
    _always("stage3_allgather_sequential", False, "a unit is gathered in one call"),
    _always("ignore_unused_parameters", True, "parameters without a gradient count as zero, on every rank"),
    _always("legacy_stage1", False, "removed upstream"),
    _moot("round_robin_gradients", as_bool, False, "flat cuts already give every rank an equal part"),
    _always("parameter_alignment", False, "where shards are cut follows from the optimizer"),
    _works("zero_hpz_partition_size", whole(1), 1, "Zero(secondary_shard) on Topology(dp_shard)"),
    _works("zero_quantized_weights", as_bool, False, "QuantizedWeights(Int8()), in two hops"),
    _always("zero_quantized_nontrainable_weights", False, "zero_quantized_weights codes frozen ones too"),
    _works("zero_quantized_gradients", as_bool, False, "TwoHop(Int4(), Int4())"),
    _moot("memory_efficient_linear", as_bool, True, "linear layers never keep gathered weights"),
    _moot("pipeline_loading_checkpoint", as_bool, False, "checkpoints are always read in a stream"),
    _moot("override_module_apply", as_bool, True, "Module.apply is never replaced"),
    _moot("log_trace_cache_warnings", as_bool, False, "there is no trace to go stale"),
    _always("enable_sanity_checks", False, "units check their own states"),
    _always("save_muon_momentum_buffer_in_memory", False, "Muon", "ds-kernels"),
    _always("leaf_module.classes", ([],), "blocks and experts are units already; name others with"
            " leaf_module.names"),
    _works("leaf_module.names", as_names, [], "Zero(leaves)"),
    _works("leaf_module.name_suffixes", as_names, [], "Zero(leaves)"),
    _works("mics_shard_size", whole(-1), -1, "Topology(dp_shard)"),
    _always("mics_hierarchical_params_gather", False, "two-level gathers", "ds-comm"),
    _works("zeropp_loco_param", as_loco, None, "LoCo(TwoHop(Int4(), Int4()), beta, reset_steps)"),
)  # fmt: skip

_MONITORS = (
    _works("csv_monitor.enabled", as_bool, False, "a csv sink"),
    _works("csv_monitor.output_path", as_text, "", "a csv sink"),
    _works("csv_monitor.job_name", as_text, "DeepSpeedJobName", "a csv sink"),
    _works("tensorboard.enabled", as_bool, False, "a tensorboard sink"),
    _works("tensorboard.output_path", as_text, "", "a tensorboard sink"),
    _works("tensorboard.job_name", as_text, "DeepSpeedJobName", "a tensorboard sink"),
    _works("wandb.enabled", as_bool, False, "a wandb sink"),
    _works("wandb.group", or_null(as_text), None, "a wandb sink"),
    _works("wandb.team", or_null(as_text), None, "a wandb sink"),
    _works("wandb.project", as_text, "deepspeed", "a wandb sink"),
    _always("comet.enabled", False, "there is no comet sink; pass one to initialize() as an object"),
    _works("timers.throughput.enabled", as_bool, True, "samples per second in the progress lines"),
    _works("timers.throughput.synchronized", as_bool, True, "the device is waited for first"),
    _always("flops_profiler.enabled", False, "ds_core.profile_model(model, batch) counts per module"),
    _works("comms_logger.enabled", as_bool, False, "ds_comm's CommLog on the mesh: log_summary(engine)"),
    _works("comms_logger.verbose", as_bool, False, "a line for each collective"),
    _works("comms_logger.prof_all", as_bool, True, "collectives of every kind"),
    _works("comms_logger.prof_ops", comm_ops, [], "only these, where prof_all is false"),
    _works("comms_logger.debug", as_bool, False, "a line for each, and the line of code that called"),
    _works("checkpoint.tag_validation", one_of("Ignore", "Warn", "Fail"), "Warn", "save_checkpoint"),
    _moot("checkpoint.load_universal", as_bool, False, "every checkpoint loads at any world size and stage"),
    _always("checkpoint.use_node_local_storage", False, "a checkpoint is one directory that all ranks see"),
    _always("checkpoint.parallel_write.pipeline_stage", False, "pipelines", "ds-pipe"),
    _moot("checkpoint.checkpoint_serialization", as_bool, True, "tensors are written as safetensors"),
    _refused("checkpoint.writer", "checkpoints are always written in the background; remove the section"),
    _refused("datastates_ckpt", "checkpoints are always written in the background; remove the section"),
)  # fmt: skip

_AC = "use torch.utils.checkpoint in the model, which works at every stage"
_AIO = "requests are cut into blocks and submitted as the queue has room, by one engine per process"
_OTHERS = (
    _always("activation_checkpointing.partition_activations", False, "split activations", "ds-pipe"),
    _works("activation_checkpointing.cpu_checkpointing", as_bool, False, "the model's blocks are run again in"
           " the backward, and their inputs wait for it on the host"),
    _always("activation_checkpointing.contiguous_memory_optimization", False, _AC),
    _always("activation_checkpointing.number_checkpoints", (None,), _AC),
    _always("activation_checkpointing.synchronize_checkpoint_boundary", False, _AC),
    _always("activation_checkpointing.profile", False, _AC),
    _refused("hybrid_engine", "generation inside training", "ds-chat"),
    _refused("pipeline", "pipelines", "ds-pipe"),
    _always("tensor_parallel.autotp_size", (0, 1), "tensor parallelism", "ds-pipe"),
    _refused("expert_parallel", "experts", "ds-moe"),
    _always("compile.deepcompile", False, "call torch.compile on the model's blocks"),
    _refused("autotuning", "`ds estimate` says which stage fits; there is no search"),
    _refused("data_efficiency", "curricula and random-LTD", "ds-compression"),
    _refused("weight_quantization", "quantised weights", "ds-compression"),
    _works("aio.block_size", whole(4096), 1 << 20, "TieredStore(block_bytes)"),
    _works("aio.queue_depth", _count, 8, "TieredStore(queue_depth)"),
    _moot("aio.intra_op_parallelism", _count, 1, _AIO),
    _moot("aio.thread_count", _count, 1, _AIO),
    _moot("aio.single_submit", as_bool, False, _AIO),
    _moot("aio.overlap_events", as_bool, True, _AIO),
    _always("aio.use_gds", False, "the disk is read to host memory"),
    _refused("nebula", "removed upstream; checkpoints are always written in the background"),
    _refused("compression_training", "compression", "ds-compression"),
    _refused("amp", "removed upstream; use bf16, fp16 or torch_autocast"),
    _refused("quantize_training", "quantised training", "ds-compression"),
    _refused("sparse_gradients", "removed upstream; gradients are reduced dense"),
    _refused("eigenvalue", "quantised training", "ds-compression"),
    _refused("sparse_attention", "sparse attention", "ds-kernels"),
    _refused("elasticity", "checkpoints load at any world size: start with another one"),
    _refused("graph_harvesting", "removed upstream; call torch.compile on the model's blocks"),
    _refused("curriculum_learning", "curricula", "ds-compression"),
    _refused("progressive_layer_drop", "dropping layers", "ds-compression"),
)  # fmt: skip


def _under(section: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(
        Row(f"{section}.{r.key}", r.kind, r.read, r.default, r.acts, r.only, r.why, r.package, r.auto)
        for r in rows
    )


ROWS: Mapping[str, Row] = {
    row.key: row for row in (*_TOP, *_PRECISION, *_under("zero_optimization", _ZERO), *_MONITORS, *_OTHERS)
}

# section -> the key that switches it on. While it is off the other keys are only checked for spelling.
GATES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("fp16", "bf16", "torch_autocast", "csv_monitor", "tensorboard", "wandb", "comet"),
            *("flops_profiler", "comms_logger", "timers.throughput"),
        ),
        "enabled",
    ),
    "zero_optimization.offload_param": "device",
    "zero_optimization.offload_optimizer": "device",
    "tensor_parallel": "autotp_size",
    "compile": "deepcompile",
}

# keys that stand in a gated section and do nothing while its gate, which must be off, is off
IDLE: Mapping[str, frozenset[str]] = {
    section: frozenset(names.split())
    for section, names in {
        "comet": "samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        "flops_profiler": "recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
        "tensor_parallel": "dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp"
        " tensor_parallel injection_policy_tuple partition_config preset_model keep_module_on_host"
        " replace_with_kernel_inject",
        "compile": "autoep_non_moe free_activation free_activation_threshold offload_activation"
        " offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log"
        " offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather"
        " keep_int_input_tensors keep_all_input_tensors passes",
    }.items()
}

ALIASES: Mapping[str, str] = {"bfloat16": "bf16"}

SECTIONS: frozenset[str] = frozenset(
    key[:at] for key in ROWS for at, letter in enumerate(key) if letter == "."
)
