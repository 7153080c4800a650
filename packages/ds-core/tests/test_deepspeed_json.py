"""DeepSpeed files: where they come from, what contradicts, what "auto" becomes, optimizers and schedules."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from ds_core.ground.settings import Origin
from ds_core.setup.batch import ACCUMULATE, MICRO, TRAIN
from ds_core.setup.config import ConfigError, Layer
from ds_core.setup.deepspeed_json import explain, translate
from ds_core.setup.plan import Plan

MINIMAL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4}
FP16 = {"fp16.enabled": True}
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


# -- unknown keys, sources, provenance -----------------------------------------------------------------------


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(
            {
                "gradient_cliping": 1,
                "zero_optimization.stge": 2,
                "fp16.enabled": True,
                "fp16.loss_scal": 0,
                "stage": 1,
            }
        )
    text = str(caught.value)
    assert "4 problems" in text
    assert 'gradient_cliping: unknown key; did you mean "gradient_clipping"? [code]' in text
    assert 'zero_optimization.stge: unknown key; did you mean "stage"?' in text
    assert 'fp16.loss_scal: unknown key; did you mean "loss_scale"?' in text
    assert 'stage: unknown key here; it belongs in "zero_optimization.stage"' in text


def test_stage_four() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization.stage: given 4; allowed: 0, 1, 2, 3 \[code\]"):
        plan({"zero_optimization.stage": 4})
    with pytest.raises(ConfigError, match=r'zero_optimization: given True; allowed: a section .*"stage": 1'):
        plan({"zero_optimization": True})


def test_sources(tmp_path: Path) -> None:
    text = json.dumps({**MINIMAL, "gradient_clipping": 0.25})
    file = tmp_path / "ds.json"
    file.write_text(text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    for source in (json.loads(text), file, str(file), text, encoded):
        assert translate(source).max_norm == 0.25
    row = next(row for row in explain(translate(file)) if row.key == "gradient_clipping")
    assert (row.value, str(row.source)) == (0.25, f"file {file}")


def test_later_sources_win_and_say_so(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(nest({**MINIMAL, "zero_optimization.stage": 1, "bf16.enabled": True})))
    made = translate(file, Layer({"zero_optimization": {"stage": 3}}, Origin("cli", "--set")))
    sources = {row.key: str(row.source) for row in explain(made)}
    assert made.stage == 3
    assert sources["zero_optimization.stage"] == "command line --set"
    assert sources["bf16.enabled"] == f"file {file}"
    assert sources["train_batch_size"] == "derived: from the batch equation"
    assert sources["gradient_clipping"] == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is there twice in one section"),
        ('{"a": ', "is no JSON"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(text)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file 'nowhere.json'; allowed: a dict"):
        translate("nowhere.json")
    with pytest.raises(FileNotFoundError, match="no config file"):
        translate(tmp_path / "nowhere.json")
    listed = tmp_path / "list.json"
    listed.write_text("[1]")
    with pytest.raises(ValueError, match="is a list; it must be an object"):
        translate(listed)


def test_old_spelling_of_bf16() -> None:
    assert plan({"bfloat16.enabled": True}).dtype == "bfloat16"
    with pytest.raises(ConfigError, match='bfloat16: the same as "bf16"; keep one'):
        plan({"bfloat16.enabled": True, "bf16.enabled": True})


def test_upstream_defaults() -> None:
    made = plan()
    assert (made.max_norm, made.stage, made.dtype, made.loss_scale) == (1.0, 0, "float32", None)
    assert plan({"gradient_clipping": 0}).max_norm is None
    made = plan({**STAGE3, **FP16})
    assert (made.zero.prefetch_numel, made.zero.persist_numel) == (50_000_000, 100_000)
    assert made.zero.bucket_numel is None  # larger buckets than ds_zero's are an upper bound that holds
    assert made.loss_scale is not None
    assert (made.loss_scale.static, made.loss_scale.initial, made.loss_scale.hysteresis) == (None, 65536.0, 2)
    assert made.owner_spec() == {
        "type": "zero",
        "stage": 3,
        "dtype": "float16",
        "prefetch_numel": 50_000_000,
        "keep_numel": 1_000_000_000,
        "persist_numel": 100_000,
    }


def test_keys_of_another_stage_are_marked() -> None:
    made = plan({"zero_optimization.stage": 2, "zero_optimization.stage3_prefetch_bucket_size": 5})
    row = next(row for row in explain(made) if row.key.endswith("prefetch_bucket_size"))
    assert row.acts == "not at stage 2: Zero(prefetch_numel)"
    assert made.zero.prefetch_numel is None


def test_precisions_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"only one precision at a time, given fp16.enabled \(code\), bf16"):
        plan({"fp16.enabled": True, "bf16.enabled": True})
    with pytest.raises(
        ConfigError, match="communication_data_type: given float16, but the compute dtype is bfloat16"
    ):
        plan({"bf16.enabled": True, "communication_data_type": "fp16"})


# -- batch sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "world", "want"),
    [
        ((32, 4, 2), 4, (32, 4, 2)),
        ((32, 4, None), 4, (32, 4, 2)),
        ((32, None, 2), 4, (32, 4, 2)),
        ((None, 4, 2), 4, (32, 4, 2)),
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 4, None), 4, (16, 4, 1)),
        (("32", "4", "auto"), 4, (32, 4, 2)),
        ((32, "auto", "auto"), 2, (32, 16, 1)),
        (("auto", 4, 2), 2, (16, 4, 2)),
    ],
)
def test_any_two_give_the_third(given: tuple[Any, Any, Any], world: int, want: tuple[int, int, int]) -> None:
    keys = {
        name: value
        for name, value in zip((TRAIN, MICRO, ACCUMULATE), given, strict=True)
        if value is not None
    }
    made = translate(keys, world=world)
    assert (made.train_batch_size, made.micro_batch_size, made.accumulate) == want


def test_contradiction_prints_the_equation_with_every_origin(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({TRAIN: 32, MICRO: 4}))
    with pytest.raises(ConfigError) as caught:
        translate(file, Layer({ACCUMULATE: "3"}, Origin("cli", "--accumulate")), world=2)
    assert (
        f"the batch sizes contradict each other: train_batch_size 32 (file {file}) ="
        f" train_micro_batch_size_per_gpu 4 (file {file}) x gradient_accumulation_steps 3 (command line"
        " --accumulate) x 2 ranks (code world size), but the right side is 24; change one of them"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({TRAIN: 10, MICRO: 4}, "10 is no multiple of 8; the nearest that are: 8 and 16"),
        (
            {ACCUMULATE: 4},
            r"not enough to know the batch sizes: train_batch_size \? = .* give train_batch_size or",
        ),
        ({}, "not enough to know the batch sizes"),
        ({TRAIN: 0}, "train_batch_size: given 0; allowed: a whole number, at least 1"),
        ({TRAIN: True}, "given True; allowed: a whole number"),
        ({TRAIN: "eight"}, "given 'eight'; allowed: a whole number"),
        ({MICRO: 1.5}, "given 1.5; allowed: a whole number"),
        ({MICRO: 1, "data_parallel_size": 4}, "given 4, but there are 2 ranks"),
    ],
)
def test_bad_batch_sizes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(given, world=2)


# -- auto ----------------------------------------------------------------------------------------------------

HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


def test_the_hugging_face_template_with_values_passed_in() -> None:
    auto = {
        MICRO: 2,
        ACCUMULATE: 4,
        "optimizer.params.lr": 1e-4,
        "optimizer.params.betas": [0.9, 0.95],
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": 0.1,
        "scheduler.params.warmup_num_steps": 10,
        "scheduler.params.total_num_steps": 100,
        "dtype": "torch.bfloat16",
    }
    made = translate(HUGGING_FACE, world=2, auto=auto)
    assert (made.train_batch_size, made.stage, made.dtype, made.max_norm) == (16, 3, "bfloat16", 1.0)
    assert made.optimizer is not None
    assert made.optimizer.params["lr"] == 1e-4
    assert made.scheduler is not None
    assert made.scheduler.params["warmup_max_lr"] == 1e-4
    assert made.scheduler.params["warmup_min_lr"] == 0.0
    sources = {row.key: str(row.source) for row in explain(made)}
    assert sources["bf16.enabled"] == "derived: auto, the model is bfloat16"
    assert sources["gradient_clipping"] == "derived: auto, the default"
    assert sources[MICRO] == "code for auto"


def test_auto_that_cannot_be_derived_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        translate(HUGGING_FACE)
    text = str(caught.value)
    for key in ("optimizer.params.lr", "scheduler.params.total_num_steps"):
        assert f'{key}: given "auto"; it cannot be derived: give a value, or pass one for it in code' in text
    assert "not enough to know the batch sizes" in text
    with pytest.raises(ConfigError, match='dump_state: given "auto"; it cannot be derived'):
        plan({"dump_state": "auto"})


# -- optimizers and schedulers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "params", "want", "decay"),
    [
        ("Adam", {}, "AdamW", 0.0),
        ("adam", {"adam_w_mode": False}, "Adam", 0.0),
        ("AdamW", {"adam_w_mode": False}, "AdamW", 0.0),
        ("Adam", {"torch_adam": True}, "AdamW", None),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, "Adam", None),
        ("AdamW", {"weight_decay": 0.1, "bias_correction": True}, "AdamW", 0.1),
        ("adagrad", {}, "Adagrad", None),
        ("SGD", {"momentum": 0.9}, "SGD", None),
        ("RMSprop", {"lr": "1e-3"}, "RMSprop", None),
    ],
)
def test_optimizers(given: str, params: dict[str, Any], want: str, decay: float | None) -> None:
    named = plan({"optimizer.type": given, "optimizer.params": params}).optimizer
    assert named is not None
    assert named.type == want
    assert named.params.get("weight_decay") == decay
    assert named.kernel == (
        "fused_" + want.lower() if want.startswith("Ada") and not params.get("torch_adam") else None
    )


@pytest.mark.parametrize(
    ("given", "params", "message"),
    [
        ("AdamV", {}, r"optimizer.type: given 'AdamV'; did you mean \"Adam"),
        ("AdamW", {"max_grad_norm": 1.0}, "max_grad_norm: given 1.0; .* set gradient_clipping instead"),
        ("AdamW", {"bias_correction": False}, "bias_correction: given False; allowed: true"),
        (
            "AdamW",
            {"weight_decy": 0.1},
            r'weight_decy: AdamW has no such parameter; did you mean "weight_decay"',
        ),
        ("AdamW", {"lr": "fast"}, "optimizer.params.lr: given 'fast'; allowed: a finite number"),
        ("MuAdam", {}, "build mup's MuAdam yourself"),
    ],
)
def test_bad_optimizers(given: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan({"optimizer.type": given, "optimizer.params": params})
    with pytest.raises(ConfigError, match=r'optimizer.type: needed when there are "optimizer.params"'):
        plan({"optimizer.params": {"lr": 1}})


@pytest.mark.parametrize(
    ("given", "params", "message"),
    [
        ("WarmUpLR", {}, r'scheduler.type: given .WarmUpLR.; did you mean "WarmupLR"'),
        (
            "WarmupLR",
            {"warmup_steps": 5},
            r'warmup_steps: WarmupLR has no such parameter; did you mean "warmup_',
        ),
        ("WarmupDecayLR", {}, "scheduler.params.total_num_steps: needed by WarmupDecayLR, but not given"),
        ("WarmupLR", {"warmup_num_steps": 0}, "given 0; allowed: a whole number, at least 1"),
    ],
)
def test_bad_schedulers(given: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan({"scheduler.type": given, "scheduler.params": params})
    with pytest.raises(ConfigError, match=r'scheduler.type: needed when there are "scheduler.params"'):
        plan({"scheduler.params": {"a": 1}})


def test_schedulers_by_name() -> None:
    one = {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 5, "decay_mom_rate": 0.1}
    for name, params in (("OneCycle", one), ("CosineAnnealingLR", {"T_max": 5}), ("WarmupLR", {})):
        made = plan({"scheduler.type": name, "scheduler.params": params}).scheduler
        assert made is not None
        assert made.type == name


def test_shards_inside_nodes() -> None:
    def plan(**zero: object) -> Plan:
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}
        return translate(config, world=8)

    assert plan().node_ranks is None
    assert plan(mics_shard_size=4).node_ranks == 4
    assert plan(mics_shard_size=8).node_ranks is None
    assert plan(mics_shard_size=1).node_ranks == 1
    assert plan(zero_hpz_partition_size=1).node_ranks is None
    second = plan(zero_hpz_partition_size=2)
    assert (second.node_ranks, second.owner_spec()["secondary_shard"]) == (2, True)
    named = plan(leaf_module={"names": ["moe"], "name_suffixes": [".experts"]})
    assert named.owner_spec()["leaves"] == ("moe", "*.experts")
    for zero, match in (
        ({"mics_shard_size": 3}, "given 3; allowed: a divisor of the 8 ranks"),
        ({"mics_shard_size": 0}, "given 0; allowed: a divisor"),
        ({"zero_hpz_partition_size": 8}, "divisor of the 8 ranks that is smaller"),
        ({"zero_hpz_partition_size": 2, "stage": 2}, "given 2, which has no effect at stage 2"),
        ({"zero_hpz_partition_size": 2, "mics_shard_size": 2}, "keep one of them"),
    ):
        with pytest.raises(ConfigError, match=match):
            plan(**zero)
