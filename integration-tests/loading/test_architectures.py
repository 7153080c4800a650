"""Ten Hugging Face architectures loaded in shards: every gathered tensor is bit for bit the file's."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core.testing.distributed import run_ranks
from ds_zero import Zero, from_pretrained, full_tensor, load_pretrained, set_full_tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to load")

RANKS_IMPORT = ("transformers.modeling_utils",)
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
# architecture -> the Auto class it is loaded by, its model class, its config
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "AutoModelForCausalLM",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "llama": ("AutoModelForCausalLM", "LlamaForCausalLM", DECODER),
    "qwen3": ("AutoModelForCausalLM", "Qwen3ForCausalLM", DECODER | {"head_dim": 8}),
    "mistral": ("AutoModelForCausalLM", "MistralForCausalLM", DECODER | {"head_dim": 8}),
    "gemma": (
        "AutoModelForCausalLM",
        "GemmaForCausalLM",
        DECODER | {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "bert": ("AutoModelForMaskedLM", "BertForMaskedLM", SMALL),
    "t5": (
        "AutoModelForSeq2SeqLM",
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "mixtral": (
        "AutoModelForCausalLM",
        "MixtralForCausalLM",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "vit": (
        "AutoModelForImageClassification",
        "ViTForImageClassification",
        {key: value for key, value in SMALL.items() if key != "vocab_size"}
        | {"image_size": 16, "patch_size": 4, "num_labels": 5},
    ),
    "qwen2_vl": (
        "AutoModelForImageTextToText",
        "Qwen2VLForConditionalGeneration",
        {"text_config": DECODER | ENDS | {"rope_parameters": {"rope_type": "default"}}}
        | {"vision_config": VISION | {"mlp_ratio": 2, "in_channels": 3}},
    ),
}


def build(name: str) -> nn.Module:
    """A tiny random model whose every tensor is its own, norms and biases too."""
    _, model_class, options = MODELS[name]
    kind = getattr(transformers, model_class)
    torch.manual_seed(1)
    model = kind(kind.config_class(**options))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    return model


def hashed(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def load(root: str, wanted: dict[str, Any]) -> dict[str, str]:
    """Every architecture, and what went wrong with it. One run for all: importing them is what takes time."""
    return {name: _load(name, f"{root}/{name}", *wanted[name]) for name in MODELS}


def _load(name: str, directory: str, wanted: dict[str, str], buffers: dict[str, str]) -> str:
    """At stages 1 and 3, and again into the sharded model after all of it was overwritten."""
    model: Any = None
    for stage in (1, 3):
        torch.manual_seed(stage)
        model = from_pretrained(getattr(transformers, MODELS[name][0]), directory)
        if not all(param.is_meta for param in model.parameters()):
            return "it was read before it was sharded"
        Zero(stage=stage, bucket_numel=3000).shard(model)
        if hashed(gathered(model)) != wanted or hashed(dict(model.named_buffers())) != buffers:
            return f"stage {stage} differs"
    for param in model.parameters():
        set_full_tensor(param, torch.zeros(param.shape))
    load_pretrained(model, directory)
    return "" if hashed(gathered(model)) == wanted else "loading again differs"


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(param) for name, param in everything(model)}


def everything(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    root = tmp_path_factory.mktemp("architectures")
    wanted: dict[str, Any] = {}
    for name in MODELS:
        model, in_parts = build(name), name in ("llama", "mixtral")
        model.save_pretrained(root / name, max_shard_size="40KB" if in_parts else "5GB")
        assert (root / name / "model.safetensors.index.json").exists() == in_parts
        kind = getattr(transformers, MODELS[name][1])
        plain, info = kind.from_pretrained(root / name, output_loading_info=True)
        assert not info["missing_keys"]
        wanted[name] = [hashed(dict(everything(plain))), hashed(dict(plain.named_buffers()))]
        assert wanted[name][0] == hashed(dict(everything(model)))  # what was saved
    ranks = run_ranks(load, 2, timeout=300.0, root=str(root), wanted=wanted)
    return {name: [rank[name] for rank in ranks] for name in MODELS}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_gathered_tensor_is_the_file_s(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes[name] == ["", ""]
