"""What transformers decides while loading reaches the shards: heads, prefixes, old names, construction."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_core.testing.distributed import run_ranks
from ds_zero import Zero, from_pretrained, full_tensor, load_pretrained, materialize, shard

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to load")

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 256, "n_embd": 128, "n_layer": 8, "n_head": 4, "n_positions": 64}

RANKS_IMPORT = ("transformers.modeling_utils",)


def written(directory: Path, model_class: str = "LlamaForCausalLM", **other: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    kind = getattr(transformers, model_class)
    kind(kind.config_class(**LLAMA | other)).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


class Lines(logging.Handler):
    """What transformers said."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        logging.getLogger("transformers").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def a_new_head(directory: str) -> list[float]:
    """The files of a language model under a classifier: the head is new, and the same on every rank."""
    torch.manual_seed(dist.get_rank())
    said = Lines()
    model = from_pretrained(transformers.AutoModelForSequenceClassification, directory, num_labels=3)
    assert "score.weight" in said.text  # missing
    assert "lm_head.weight" in said.text  # unexpected
    frozen = model.model.requires_grad_(False)
    optimizer = torch.optim.SGD(model.score.parameters(), lr=0.1)
    shard(model, optimizer, stage=3, dtype=torch.bfloat16)
    stored = load_file(Path(directory) / "model.safetensors")
    for name, param in frozen.named_parameters():
        assert torch.equal(full_tensor(param), stored[f"model.{name}"].bfloat16()), name
    head = full_tensor(model.score.weight, master=True)
    assert 0.01 < float(head.std()) < 0.03  # transformers' initializer_range is 0.02
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    return [float(x) for x in head.view(-1)]


def test_a_new_head_is_initialised_named_and_the_same_on_every_rank(tmp_path: Path) -> None:
    written(tmp_path)
    first, second = run_ranks(a_new_head, 2, directory=str(tmp_path))
    assert first == second


def adapted(directory: str) -> None:
    """LoRA beside weights that are still in their files: B is zero, A is not, the base is the file's."""
    import peft

    model = from_pretrained(transformers.AutoModelForCausalLM, directory)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with materialize():
        model = peft.get_peft_model(model, settings)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1.0)
    shard(model, optimizer, stage=3)
    ids = torch.arange(16).view(2, 8)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    wanted = plain(input_ids=ids, labels=ids).loss
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, wanted)
    for name, param in model.named_parameters():
        value = full_tensor(param)
        assert param.requires_grad == ("lora_" in name)
        assert bool(value.any()) == ("lora_B" not in name), name
    loss.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < loss


def test_adapters_beside_weights_that_are_in_files(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    written(tmp_path)
    run_ranks(adapted, 2, directory=str(tmp_path))


def other_names(root: str, cases: list[list[str]]) -> None:
    for directory, model_class, wanted_from in cases:
        kind = getattr(transformers, model_class)
        model = from_pretrained(kind, Path(root, directory), attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        plain = kind.from_pretrained(Path(root, wanted_from))
        Zero(stage=3, bucket_numel=500).shard(model)
        for name, param in plain.named_parameters():
            if name != "lm_head.weight" or directory == wanted_from:
                assert torch.equal(full_tensor(model.get_parameter(name)), param), (directory, name)


def test_prefixes_old_names_and_experts_apart(tmp_path: Path) -> None:
    """A base model's files in a model with a head, and the other way; experts as Mixtral was published."""
    written(tmp_path / "head")
    written(tmp_path / "base", "LlamaModel")
    tensors = written(tmp_path / "experts", "MixtralForCausalLM", num_local_experts=4)
    assert any("block_sparse_moe.experts.3.w1" in name for name in tensors), list(tensors)
    bert = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
    written(tmp_path / "bert", "BertModel", **bert)
    names = written(tmp_path / "old", "BertModel", **bert)  # as TensorFlow's BERT had them
    names = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in names.items()}
    save_file(names, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    cases = [
        ["base", "LlamaForCausalLM", "head"],
        ["head", "LlamaModel", "head"],
        ["experts", "MixtralForCausalLM", "experts"],
        ["old", "BertModel", "bert"],
    ]
    base = load_file(tmp_path / "base" / "model.safetensors")
    head = load_file(tmp_path / "head" / "model.safetensors")
    assert all(torch.equal(head[f"model.{name}"], tensor) for name, tensor in base.items())  # one seed
    run_ranks(other_names, 2, timeout=120.0, root=str(tmp_path), cases=cases)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    config = transformers.LlamaConfig(**LLAMA | {"intermediate_size": 40})
    with pytest.raises(
        ValueError, match=r"6 tensors .*model\.layers\.1\.mlp\.up_proj\.weight is \[48, 32\] in"
    ):
        from_pretrained(transformers.LlamaForCausalLM, tmp_path, config=config)
    model = transformers.LlamaForCausalLM(config)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match="6 tensors have another shape"):
        load_pretrained(model, tmp_path)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    changed = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    changed.model.layers[1].mlp.down_proj = torch.nn.Sequential(torch.nn.Linear(48, 32, bias=False))
    with pytest.warns(UserWarning, match=r"not in the model: model\.layers\.1\.mlp\.down_proj\.weight"):
        loaded = load_pretrained(changed, tmp_path)
    assert loaded.missing == ("model.layers.1.mlp.down_proj.0.weight",)
    quantised = transformers.LlamaConfig(**LLAMA, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="these files are quantised, and quantised loading needs whole"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path, config=quantised)
    with pytest.raises(ValueError, match=r"cannot take device_map='auto': the mesh"):
        from_pretrained(transformers.LlamaForCausalLM, tmp_path, device_map="auto")


def inside(directory: str) -> None:
    """transformers' own from_pretrained in the context, and load_pretrained before sharding."""
    stored = load_file(Path(directory) / "model.safetensors")
    with materialize():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        other = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(directory)
        )
    load_pretrained(other, directory)
    for each in (model, other):
        assert all(param.is_meta for param in each.parameters())
        Zero(stage=3).shard(each)
        for name, param in each.named_parameters():
            assert torch.equal(full_tensor(param), stored[name]), name


def test_transformers_own_loading_inside_the_context(tmp_path: Path) -> None:
    written(tmp_path)
    run_ranks(inside, 2, directory=str(tmp_path))


def constructed() -> None:
    """GPT-2 from its config: every tensor spreads as transformers would have it, c_proj less than others."""
    config = transformers.GPT2Config(**GPT2)
    with materialize():
        model = transformers.AutoModelForCausalLM.from_config(config)
    plain = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    Zero(stage=3).shard(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, param in plain.named_parameters():
        found = full_tensor(model.get_parameter(name))
        # 8 standard errors of a standard deviation from n normal values, for both: s / sqrt(2 n)
        margin = 16 * float(param.std()) / (2 * param.numel()) ** 0.5
        assert abs(float(found.std() - param.std())) <= margin, name
        assert abs(float(found.mean() - param.mean())) <= 2 * margin, name
    assert float(plain.transformer.h[0].mlp.c_proj.weight.std()) < 0.01  # so the test would notice


def test_construction_gives_the_distributions_of_the_library() -> None:
    run_ranks(constructed, 2)
