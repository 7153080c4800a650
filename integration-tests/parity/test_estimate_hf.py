"""The estimator's reading of a Hugging Face config against the model that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_core.setup.predict import Settings, activation_bytes
from ds_core.setup.shape import Dims, Shape

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "llama with biases": {**COMMON, "attention_bias": True, "mlp_bias": True},
    "mistral": COMMON,
    "qwen2": {**COMMON, "tie_word_embeddings": True},
    "qwen3": {**COMMON, "head_dim": 32},
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **COMMON,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 32},
}


def build(name: str, device: str, **more: Any) -> Any:
    kind = name.split()[0]
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[name], **more)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("bucket_numel", [1, 20_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_units_from_the_config_are_those_of_the_model(name: str, bucket_numel: int) -> None:
    config = {"model_type": name.split()[0], **CONFIGS[name]}
    made, expected = (
        Shape.from_config(config, bucket_numel=bucket_numel),
        Shape.of(build(name, "meta"), bucket_numel=bucket_numel),
    )
    assert [unit.numel for unit in made.units] == [unit.numel for unit in expected.units]
    assert [sorted(unit.numels) for unit in made.units] == [sorted(unit.numels) for unit in expected.units]
    if bucket_numel == 1:  # a unit of several modules has several uses, in a row
        assert made.uses == expected.uses


def test_another_architecture_is_built_on_meta() -> None:
    config = {"model_type": "gpt_neox", **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}}
    shape = Shape.from_config(config)
    assert shape.dims is not None
    assert shape.numel == sum(p.numel() for p in _neox(config).parameters())


def _neox(config: dict[str, Any]) -> Any:
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**values))


def saved_bytes(model: Any, batch: int, seq: int) -> int:
    """Bytes of the storages that autograd saves in one forward with a loss, parameters left out."""
    params = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in params:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 128, (batch, seq))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral"])
def test_activations_are_what_autograd_saves(name: str) -> None:
    """Within 10 %: the formula leaves out what is small beside a stream (masks, statistics, indices)."""
    model = build(name, "cpu").eval() if name == "gpt2" else build(name, "cpu")
    config = {"model_type": name, **CONFIGS[name]}
    settings = Settings(dtype="float32", micro_batch=2, seq=32)
    dims = Dims.from_config(config)
    # Of the logits a forward saves the log-softmax; themselves, their fp32 copy and the gradient come beside.
    beside = 2 * 32 * dims.vocab * (4 + 8)
    predicted = activation_bytes(dims, settings) - beside
    assert saved_bytes(model, 2, 32) == pytest.approx(predicted, rel=0.1)
