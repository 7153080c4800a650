"""A DeepSpeed file's ZeRO++ and LoCo keys: what they come to, what contradicts itself, what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import ds_core
from ds_core.setup import plugins
from ds_core.setup.config import ConfigError
from ds_core.setup.deepspeed_json import explain, translate
from ds_core.setup.deepspeed_wire import build_routes
from ds_core.setup.plan import Plan, Wire


def plan(zero: dict[str, Any], **more: Any) -> Plan:
    return translate({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **more})


WEIGHTS, GRADIENTS = {"zero_quantized_weights": True}, {"zero_quantized_gradients": True}


def test_nothing_is_quantised_by_default() -> None:
    off = {"zero_quantized_weights": False, "zero_quantized_gradients": False, "zeropp_loco_param": None}
    for zero in ({"stage": 3}, {"stage": 3, **off}):
        assert plan(zero).wire is None


def test_the_keys_together() -> None:
    loco = {"zeropp_loco_param": {"err_beta": 0.9, "reset_T": 512}}
    found = plan({"stage": 3, **WEIGHTS, **GRADIENTS, **loco})
    assert found.wire == Wire(weights=True, gradients=True, loco={"beta": 0.9, "reset_steps": 512})
    acts = {row.key: row.acts for row in explain(found)}
    assert acts["zero_optimization.zeropp_loco_param"] == "LoCo(TwoHop(Int4(), Int4()), beta, reset_steps)"
    assert plan({"stage": 3, **WEIGHTS}).wire == Wire(weights=True)
    assert plan({"stage": 2, **GRADIENTS, "zeropp_loco_param": {}}).wire == Wire(gradients=True, loco={})


def test_where_steps_are_skipped_nan_gets_through() -> None:
    for section in ({"fp16": {"enabled": True}}, {"bf16": {"enabled": True, "check_grad_overflow": True}}):
        found = plan({"stage": 2, **GRADIENTS, "zeropp_loco_param": {}}, **section)
        assert found.wire is not None
        assert found.wire.marks
        assert any("units of the scaled loss" in notice for notice in found.notices)
    found = plan({"stage": 2, **GRADIENTS}, bf16={"enabled": True})
    assert found.wire is not None
    assert not found.wire.marks


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 2, **WEIGHTS}, "zero_quantized_weights.*no effect at stage 2"),
        ({"stage": 3, "zeropp_loco_param": {}}, "zeropp_loco_param.*set zero_quantized_gradients to true"),
        ({"stage": 3, **GRADIENTS, "zeropp_loco_param": {"beta": 1}}, "given 'beta'"),
        ({"stage": 3, **GRADIENTS, "zeropp_loco_param": {"err_beta": 1}}, "err_beta: .*below 1"),
        ({"stage": 3, **GRADIENTS, "zeropp_loco_param": {"reset_T": 0}}, "reset_T"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "codes frozen ones too"),
    ],
)
def test_what_does_not_go_together(zero: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(zero)


@pytest.mark.parametrize("keys", [WEIGHTS, GRADIENTS])
def test_the_package_to_install(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("int8", "int4", "two_hop", "quantized_weights")
    real = plugins.find
    monkeypatch.setattr(plugins, "find", lambda kind, name: None if name in ours else real(kind, name))
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}
    stage = 3 if keys is WEIGHTS else 0
    with pytest.raises(LookupError, match=r"comes with ds-comm \(pip install ds-comm\)"):
        ds_core.initialize(
            model=nn.Linear(2, 2), config={**config, "zero_optimization": {"stage": stage, **keys}}
        )


def test_the_objects_that_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "look_up", lambda kind, name: lambda *args, **more: [name, *args, more])
    assert build_routes(Wire(weights=True)) == {"gather": ["quantized_weights", ["int8", {}], {}]}
    hops = [["int4", {"nonfinite": "mark"}]] * 2
    wanted = ["loco", ["two_hop", *hops, {}], {"beta": 0.5}]
    assert build_routes(Wire(gradients=True, loco={"beta": 0.5}, marks=True)) == {"reduce": wanted}
