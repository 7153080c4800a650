"""Every key of a DeepSpeed file: it changes the plan, or is how things are done, or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ds_core.setup.batch import MICRO, TRAIN
from ds_core.setup.config import ConfigError
from ds_core.setup.deepspeed_json import explain, translate
from ds_core.setup.deepspeed_keys import GATES, IDLE, ROWS
from ds_core.setup.plan import Plan

MINIMAL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4}
FP16 = {"fp16.enabled": True}
ADAM = {"optimizer.type": "AdamW"}
STAGE3 = {"zero_optimization.stage": 3}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def plan(flat: dict[str, Any] | None = None, **options: Any) -> Plan:
    return translate(nest({**MINIMAL, **(flat or {})}), **options)


def at(made: Any, path: str) -> Any:
    for name in path.split("."):
        made = (
            made[int(name)]
            if name.isdigit()
            else made[name]
            if isinstance(made, dict)
            else getattr(made, name)
        )
    return made


ON_HOST = {"zero_optimization.offload_optimizer.device": "cpu"}
ON_NVME = {
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_optimizer.nvme_path": "/disk",
}
PARAMS_ON_NVME = {
    **STAGE3,
    "bf16.enabled": True,
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.offload_param.nvme_path": "/disk",
}
# sections that must be open for their keys to be looked at
OPEN = {"zero_optimization.offload_optimizer": ON_HOST, "zero_optimization.offload_param": PARAMS_ON_NVME}

# key -> (value, keys that go with it, where it shows in the plan, what it shows)
VOCABULARY = "vocabulary_size 50257 is no multiple of 8, which tensor cores want"

WORKS: dict[str, tuple[Any, dict[str, Any], str, Any]] = {
    "train_batch_size": (24, {}, "accumulate", 6),
    "train_micro_batch_size_per_gpu": (3, {}, "train_batch_size", 3),
    "gradient_accumulation_steps": (5, {}, "accumulate", 5),
    "optimizer.type": ("SGD", {}, "optimizer.type", "SGD"),
    "optimizer.params": ({"lr": 0.5}, ADAM, "optimizer.params.lr", 0.5),
    "scheduler.type": ("WarmupLR", {}, "scheduler.type", "WarmupLR"),
    "scheduler.params": (
        {"warmup_num_steps": 7},
        {"scheduler.type": "WarmupLR"},
        "scheduler.params.warmup_num_steps",
        7,
    ),
    "steps_per_print": (10, {}, "reporting.steps_per_print", 10),
    "dump_state": (True, {}, "reporting.dump_state", True),
    "disable_python_gc": (True, {}, "disable_python_gc", True),
    "communication_data_type": ("fp16", FP16, "dtype", "float16"),
    "gradient_clipping": (0.5, {}, "max_norm", 0.5),
    "zero_allow_untested_optimizer": (False, {}, "allow_untested_optimizer", False),
    "vocabulary_size": (50257, {}, "notices.0", VOCABULARY),
    "wall_clock_breakdown": (True, {}, "reporting.wall_clock_breakdown", True),
    "dataloader_drop_last": (True, {}, "drop_last", True),
    "log_level": ("DEBUG", {}, "reporting.log_level", "debug"),
    "data_parallel_size": (1, {}, "world", 1),
    "fp16.enabled": (True, {}, "dtype", "float16"),
    "fp16.auto_cast": (True, FP16, "cast_inputs", True),
    "fp16.loss_scale": (128, FP16, "loss_scale.static", 128.0),
    "fp16.initial_scale_power": (8, FP16, "loss_scale.initial", 256.0),
    "fp16.loss_scale_window": (50, FP16, "loss_scale.window", 50),
    "fp16.hysteresis": (4, FP16, "loss_scale.hysteresis", 4),
    "fp16.consecutive_hysteresis": (True, FP16, "loss_scale.consecutive_hysteresis", True),
    "fp16.min_loss_scale": (2, FP16, "loss_scale.minimum", 2.0),
    "bf16.enabled": (True, {}, "dtype", "bfloat16"),
    "bf16.check_grad_overflow": (True, {"bf16.enabled": True}, "skip_overflow", True),
    "torch_autocast.enabled": (True, {}, "autocast", "bfloat16"),
    "torch_autocast.dtype": ("float16", {"torch_autocast.enabled": True}, "loss_scale.window", 1000),
    "data_types.grad_accum_dtype": ("bf16", STAGE3, "zero.grad_dtype", "bfloat16"),
    "data_types.param_dtype": ("fp32", {}, "dtype", "float32"),
    "data_types.keep_in_fp32_modules": (["norm", "wo"], STAGE3, "zero.keep_fp32", ("*.norm", "*.wo")),
    "zero_optimization.stage": (2, {}, "stage", 2),
    "zero_optimization.reduce_bucket_size": (5e5, {}, "zero.bucket_numel", 500_000),
    "zero_optimization.allgather_bucket_size": (
        "4e5",
        {"zero_optimization.reduce_bucket_size": 5e5},
        "zero.bucket_numel",
        400_000,
    ),
    "zero_optimization.overlap_comm": (False, {}, "zero.overlap", False),
    "zero_optimization.stage3_prefetch_bucket_size": (1e6, STAGE3, "zero.prefetch_numel", 1_000_000),
    "zero_optimization.stage3_param_persistence_threshold": (7, STAGE3, "zero.persist_numel", 7),
    "zero_optimization.stage3_max_reuse_distance": (9, STAGE3, "zero.keep_numel", 9),
    "zero_optimization.stage3_max_live_parameters": (1e5, STAGE3, "zero.prefetch_numel", 100_000),
    "zero_optimization.zero_hpz_partition_size": (2, STAGE3, "zero.secondary_shard", True),
    "zero_optimization.zero_quantized_weights": (True, STAGE3, "wire.weights", True),
    "zero_optimization.zero_quantized_gradients": (True, {}, "wire.gradients", True),
    "zero_optimization.zeropp_loco_param": (
        {"reset_T": 5}, {"zero_optimization.zero_quantized_gradients": True}, "wire.loco", {"reset_steps": 5}
    ),
    "zero_optimization.mics_shard_size": (2, STAGE3, "node_ranks", 2),
    "zero_optimization.leaf_module.names": (["moe"], STAGE3, "zero.leaves", ("moe",)),
    "zero_optimization.leaf_module.name_suffixes": (["moe"], STAGE3, "zero.leaves", ("*moe",)),
    "zero_optimization.offload_optimizer.device": ("cpu", {}, "offload.masters", "host"),
    "zero_optimization.offload_optimizer.nvme_path": (
        "/disk",
        {"zero_optimization.offload_optimizer.device": "nvme"},
        "offload.nvme",
        "/disk",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        0.25,
        ON_HOST,
        "offload.moments",
        "0.75 device / 0.25 host",
    ),
    "zero_optimization.offload_optimizer.super_offload": (True, ON_HOST, "offload.update", "speculative"),
    "zero_optimization.offload_param.device": (
        "cpu",
        {**STAGE3, "bf16.enabled": True},
        "offload.params",
        "host",
    ),
    "zero_optimization.offload_param.nvme_path": (
        "/disk",
        {**STAGE3, "bf16.enabled": True, "zero_optimization.offload_param.device": "nvme"},
        "offload.nvme",
        "/disk",
    ),
    "zero_optimization.offload_param.max_in_cpu": (5, PARAMS_ON_NVME, "offload.params_in_host", 5),
    "zero_optimization.zenflow": ({"topk_ratio": 0.2}, ON_HOST, "offload.zenflow.topk_ratio", 0.2),
    "zero_optimization.sub_group_size": (1e6, ON_HOST, "offload.chunk_numel", 1_000_000),
    "zero_optimization.cpu_offload": (True, {}, "offload.masters", "host"),
    "zero_optimization.cpu_offload_param": (
        True,
        {**STAGE3, "bf16.enabled": True},
        "offload.params",
        "host",
    ),
    "aio.block_size": (65536, ON_NVME, "offload.block_bytes", 65536),
    "aio.queue_depth": (16, ON_NVME, "offload.queue_depth", 16),
    "activation_checkpointing.cpu_checkpointing": (True, {}, "cpu_checkpointing", True),
    "csv_monitor.enabled": (True, {}, "reporting.sinks.0.type", "csv"),
    "csv_monitor.output_path": (
        "out",
        {"csv_monitor.enabled": True},
        "reporting.sinks.0.path",
        "out/DeepSpeedJobName.csv",
    ),
    "csv_monitor.job_name": (
        "run",
        {"csv_monitor.enabled": True, "csv_monitor.output_path": "out"},
        "reporting.sinks.0.path",
        "out/run.csv",
    ),
    "tensorboard.enabled": (True, {}, "reporting.sinks.0.type", "tensorboard"),
    "tensorboard.output_path": (
        "out",
        {"tensorboard.enabled": True},
        "reporting.sinks.0.folder",
        "out/DeepSpeedJobName",
    ),
    "tensorboard.job_name": (
        "run",
        {"tensorboard.enabled": True, "tensorboard.output_path": "out"},
        "reporting.sinks.0.folder",
        "out/run",
    ),
    "wandb.enabled": (True, {}, "reporting.sinks.0.project", "deepspeed"),
    "wandb.group": ("g", {"wandb.enabled": True}, "reporting.sinks.0.group", "g"),
    "wandb.team": ("t", {"wandb.enabled": True}, "reporting.sinks.0.entity", "t"),
    "wandb.project": ("p", {"wandb.enabled": True}, "reporting.sinks.0.project", "p"),
    "timers.throughput.enabled": (False, {}, "reporting.throughput", False),
    "timers.throughput.synchronized": (False, {}, "reporting.synchronize", False),
    "comms_logger.enabled": (True, {}, "reporting.comms.verbose", False),
    "comms_logger.verbose": (True, {"comms_logger.enabled": True}, "reporting.comms.verbose", True),
    "comms_logger.prof_all": (
        False,
        {"comms_logger.enabled": True, "comms_logger.prof_ops": ["broadcast"]},
        "reporting.comms.ops.0",
        "broadcast",
    ),
    "comms_logger.prof_ops": (
        ["all_gather_into_tensor", "all_gather"],
        {"comms_logger.enabled": True, "comms_logger.prof_all": False},
        "reporting.comms.ops",
        ("all_gather",),
    ),
    "comms_logger.debug": (True, {"comms_logger.enabled": True}, "reporting.comms.debug", True),
    "checkpoint.tag_validation": ("FAIL", {}, "tag_validation", "Fail"),
}  # fmt: skip

OF_NODES = {"zero_optimization.zero_hpz_partition_size", "zero_optimization.mics_shard_size"}
CONSTRAINTS = {
    "zero_optimization.offload_optimizer.nvme_path",  # without it the file is refused
    "zero_optimization.offload_param.nvme_path",
    "communication_data_type",
    "data_parallel_size",
    "data_types.param_dtype",
    "comms_logger.prof_ops",
}  # checked, not stored


def kind(name: str) -> list[str]:
    return sorted(key for key, row in ROWS.items() if row.kind == name)


def test_every_working_key_is_tried() -> None:
    assert sorted(WORKS) == kind("works")


@pytest.mark.parametrize("key", kind("works"))
def test_a_working_key_changes_the_plan(key: str) -> None:
    value, with_keys, path, want = WORKS[key]
    flat = {**MINIMAL, **with_keys}
    world = 8 if key in OF_NODES else 1
    made = translate(nest({**flat, key: value}), world=world)
    assert at(made, path) == want
    if key not in CONSTRAINTS:
        without = {name: one for name, one in flat.items() if name != key}
        before = translate(nest(without if TRAIN in without or MICRO in without else {MICRO: 1}), world=world)
        assert made.model_dump(exclude={"keys"}) != before.model_dump(exclude={"keys"})
    row = next(row for row in explain(made) if row.key == key)
    assert str(row.source) == "code"
    assert row.acts.endswith(ROWS[key].acts)


@pytest.mark.parametrize("key", kind("always"))
def test_what_is_always_so_is_accepted_and_the_rest_refused(key: str) -> None:
    row = ROWS[key]
    section = key.partition(".")[0]
    gate = {f"{section}.enabled": True} if section in ("fp16", "bf16", "torch_autocast") else {}
    for value in row.only:
        lines = explain(plan({**gate, key: value}))
        assert any(line.key == key and line.acts.startswith("always so") for line in lines)
    other = not row.only[0] if isinstance(row.only[0], bool) else "something else"
    with pytest.raises(ConfigError) as caught:
        plan({**gate, key: other})
    text = str(caught.value)
    assert f"{key}: given {json.dumps(other)}; allowed: {json.dumps(row.only[0])}" in text
    assert row.why in text
    assert row.package is None or f"{row.why} needs {row.package}: pip install {row.package}" in text


@pytest.mark.parametrize("key", kind("no effect"))
def test_what_has_no_effect_is_checked_and_said(key: str) -> None:
    row = ROWS[key]
    other = not row.default if isinstance(row.default, bool) else ["x"] if row.default == "auto" else 12345
    gate: dict[str, Any] = {"bf16.enabled": True} if key.startswith("bf16") else {}
    gate |= OPEN.get(key.rpartition(".")[0], {})
    if isinstance(row.default, float):
        other = 0.5
    made = plan({**gate, key: other})
    assert any(line.key == key and line.acts == f"no effect: {row.why}" for line in explain(made))
    assert any(note.startswith(key) for note in made.notices)
    with pytest.raises(ConfigError, match="allowed"):
        plan({**gate, key: {"not": "this"}})


@pytest.mark.parametrize("key", kind("refused"))
def test_refused_keys_name_the_reason_or_the_package(key: str) -> None:
    row = ROWS[key]
    with pytest.raises(ConfigError) as caught:
        plan({key: {"some": 1}})
    assert f"{key}: a section; allowed: leaving it out; {row.why}" in str(caught.value)
    assert row.package is None or f"pip install {row.package}" in str(caught.value)
    for off in (None, False, {}, {"enabled": False, "more": 1}):
        assert any(line.key == key and line.acts.startswith("off") for line in explain(plan({key: off})))


@pytest.mark.parametrize("section", sorted(GATES))
def test_a_closed_gate_still_checks_names(section: str) -> None:
    gate = f"{section}.{GATES[section]}"
    off = "none" if GATES[section] == "device" else 0 if GATES[section] == "autotp_size" else False
    names = sorted(
        {*IDLE.get(section, ()), *(k.rpartition(".")[2] for k in ROWS if k.startswith(f"{section}."))}
    )
    for name in names:
        key = f"{section}.{name}"
        if key != gate:
            lines = explain(plan({gate: off, key: "whatever"}))
            assert next(line.acts for line in lines if line.key == key) == f"off, since {gate} is"
    with pytest.raises(ConfigError, match=f"{section}.nonsense: unknown key; "):
        plan({gate: off, "x": 1, f"{section}.nonsense": 1})


def test_documented_features_need_their_package() -> None:
    with pytest.raises(ConfigError, match="two-level gathers needs ds-comm"):
        plan({"zero_optimization.mics_hierarchical_params_gather": True})
    for kind_, package in (("Lamb", "ds-kernels"), ("OneBitAdam", "ds-comm")):
        with pytest.raises(ConfigError, match=f"given '{kind_}'; no optimizer .* comes with {package}"):
            plan({"optimizer.type": kind_})
