"""A DeepSpeed file's offloading: what it comes to together, what contradicts itself, what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core.setup import plugins
from ds_core.setup.config import ConfigError
from ds_core.setup.deepspeed_json import explain, translate
from ds_core.setup.plan import Plan


def plan(zero: dict[str, Any], **more: Any) -> Plan:
    return translate({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **more})


def spec(zero: dict[str, Any], numel: int = 1000, **more: Any) -> dict[str, Any]:
    offload = plan(zero, **more).offload
    assert offload is not None
    return offload.spec(numel)


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/disk"}
BF16 = {"bf16": {"enabled": True}}


def test_nothing_is_off_the_device_by_default() -> None:
    for zero in ({"stage": 2}, {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": None}):
        assert plan(zero).offload is None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_at_every_stage(stage: int) -> None:
    kinds = ("masters", "moments", "grads")
    common = {"type": "tiered", "params": "device"}
    for zero in ({"offload_optimizer": CPU}, {"cpu_offload": True}):
        assert spec({"stage": stage, **zero}) == {**common, **dict.fromkeys(kinds, "host")}
    wanted = {**common, **dict.fromkeys(kinds, "nvme"), "nvme": "/disk"}
    assert spec({"stage": stage, "offload_optimizer": NVME}) == wanted


@pytest.mark.parametrize(
    ("ratio", "split"),
    [
        (0, "device"),
        (0.0, "device"),
        (1, "host"),
        (0.3, "0.7 device / 0.3 host"),
        ("5e-1", "0.5 device / 0.5 host"),
    ],
)
def test_a_ratio_leaves(ratio: Any, split: str) -> None:
    made = spec({"stage": 3, "offload_optimizer": {**CPU, "ratio": ratio}})
    assert [made[kind] for kind in ("masters", "moments", "grads")] == [split] * 3


@pytest.mark.parametrize(
    ("in_host", "split"), [(None, "host"), (0, "nvme"), (1000, "host"), (250, "0.25 host / 0.75 nvme")]
)
def test_parameters_on_nvme_stay_on_the_host_up_to_max_in_cpu(in_host: int | None, split: str) -> None:
    section = {**NVME, **({} if in_host is None else {"max_in_cpu": in_host})}
    made = spec({"stage": 3, "offload_param": section, "offload_optimizer": CPU})
    assert (made["params"], made["masters"], made["nvme"]) == (split, "host", "/disk")


def test_how_state_travels() -> None:
    aio = {"block_size": 131072, "queue_depth": 32, "single_submit": True, "overlap_events": False}
    made = spec({"stage": 3, "offload_optimizer": NVME, "sub_group_size": 100}, aio=aio)
    assert (made["block_bytes"], made["queue_depth"], made["chunk_numel"]) == (131072, 32, 4096)
    assert "chunk_numel" not in spec({"stage": 3, "offload_optimizer": NVME, "sub_group_size": 1e9})
    told = plan(
        {"stage": 3, "offload_optimizer": {**NVME, "pipeline_read": True, "fast_init": True}}, aio=aio
    )
    said = " ".join(told.notices)
    for name in (
        "aio.single_submit = True",
        "aio.overlap_events",
        "pipeline_read = True",
        "fast_init = True",
    ):
        assert name in said


def test_keys_that_do_nothing_say_so() -> None:
    rows = {row.key: row for row in explain(plan({"stage": 1, "sub_group_size": 10}, aio={"queue_depth": 4}))}
    assert rows["zero_optimization.sub_group_size"].acts.startswith("the optimizer's state is on the device")
    assert rows["aio.queue_depth"].acts.startswith("nothing is on nvme")
    assert not rows["aio.queue_depth"].active
    rows = {row.key: row for row in explain(plan({"offload_optimizer": NVME}, aio={"queue_depth": 4}))}
    assert rows["aio.queue_depth"].active


def test_zenflow_and_speculation() -> None:
    section = {
        "topk_ratio": 0.2, "select_strategy": "step", "select_interval": 4, "update_interval": "auto",
        "overlap_step": True, "auto_ratio": 0.9, "full_warm_up_rounds": 3, "offload": False,
        "pt_reserved_cores_perc": 0.5,
    }  # fmt: skip
    told = plan({"stage": 2, "offload_optimizer": CPU, "zenflow": section})
    assert told.offload is not None
    assert told.offload.zenflow == {
        "topk_ratio": 0.2, "select_interval": 4, "update_interval": "auto", "overlap": True,
        "auto_ratio": 0.9, "warmup": 3,
    }  # fmt: skip
    for name in ("select_strategy", "offload", "pt_reserved_cores_perc"):
        assert any(note.startswith(f"zero_optimization.zenflow.{name} = ") for note in told.notices)
    assert spec({"stage": 2, "offload_optimizer": CPU, "zenflow": {}})["zenflow"] == {}
    assert spec({"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}})["update"] == "speculative"


WRONG = {
    "given 'tpu'; allowed: none, cpu, nvme": {"offload_optimizer": {"device": "tpu"}},
    "offload_optimizer.nvme_path: needed when the device": {"offload_optimizer": {"device": "nvme"}},
    "offload_param.nvme_path: needed when the device": {
        "stage": 3, "offload_optimizer": CPU, "offload_param": {"device": "nvme"}
    },
    "given 1.5; allowed: a number from 0 to 1": {"offload_optimizer": {**CPU, "ratio": 1.5}},
    "offload_param.device: given at stage 2": {"stage": 2, "offload_optimizer": CPU, "offload_param": CPU},
    "cpu_offload_param: given at stage 0": {"cpu_offload": True, "cpu_offload_param": True},
    "in fp32 a shard is its own master": {"stage": 3, "offload_param": CPU},
    "says cpu, and zero_optimization.offload_optimizer.device says nvme": {
        "cpu_offload": True, "offload_optimizer": NVME
    },
    "another folder; give both the same": {
        "stage": 3, "offload_optimizer": NVME, "offload_param": {"device": "nvme", "nvme_path": "/other"}
    },
    "acts on an optimizer off the device": {"zenflow": {"topk_ratio": 0.1}},
    "given 'top'; ": {"offload_optimizer": CPU, "zenflow": {"top": 0.1}},
    "topk_ratio: given 2": {"offload_optimizer": CPU, "zenflow": {"topk_ratio": 2}},
    "select_strategy: given 'epoch'; allowed: auto, step": {
        "offload_optimizer": CPU, "zenflow": {"select_strategy": "epoch"}
    },
    "says another order of the same update": {
        "offload_optimizer": {**CPU, "super_offload": True}, "zenflow": {"topk_ratio": 0.1}
    },
    "unknown key; did you mean": {"offload_optimizer": {**CPU, "ration": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_what_contradicts_itself_is_named(said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(WRONG[said])
    assert said in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plugins.find
    monkeypatch.setattr(plugins, "find", lambda kind, name: None if name == "tiered" else real(kind, name))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"offload_optimizer": CPU},
    }
    model = nn.Linear(2, 2)
    with pytest.raises(
        LookupError, match=r'no store "tiered".*comes with ds-offload \(pip install ds-offload\)'
    ):
        ds_core.initialize(model=model, config=config)
    assert type(model.weight) is nn.Parameter  # nothing was touched


def test_checkpointed_inputs_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))

    def train(config: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
        packed = []
        with monkeypatch.context() as patch:
            real = torch.autograd.graph.save_on_cpu

            def counted(*args: Any, **options: Any) -> Any:
                packed.append(options)
                return real(*args, **options)

            patch.setattr(torch.autograd.graph, "save_on_cpu", counted)
            engine, *_ = ds_core.initialize(model=build(), config={**BASE, **config})
            for seed in range(3):
                x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
                engine.backward(engine(x).square().mean())
                engine.step()
        return [param.detach().clone() for param in engine.module.parameters()], len(packed)

    plain, none = train({})
    kept, blocks = train({"activation_checkpointing": {"cpu_checkpointing": True}})
    assert all(map(torch.equal, plain, kept))
    assert (none, blocks) == (0, 9)


BASE = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
