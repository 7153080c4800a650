"""What `export_hf` writes, from_pretrained loads: the same logits, tied, untied, sharded, in bf16."""

from pathlib import Path

import pytest
import torch

from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.export import export_hf
from ds_core.state.shard import FlatShard
from ds_core.testing.distributed import run_ranks
from ds_core.testing.parts import CutPart, even_cut

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: no export to compare"
)

RANKS_IMPORT = ("transformers.modeling_utils",)
KINDS = ("gpt2", "llama", "llama-tied")


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=kind == "llama-tied",
    )
    return transformers.LlamaForCausalLM(config).eval()


def save(rank: int, world: int, folder: str, kind: str) -> None:
    """As a sharding runtime does: every parameter once, cut flat."""
    part = CutPart({})
    for name, parameter in tiny(kind).named_parameters():
        flat = parameter.detach().reshape(-1)
        start, end = even_cut(flat.numel(), rank, world)
        part.held[name] = FlatShard(flat[start:end].clone(), parameter.shape, start)
    CheckpointStore(folder).save(1, {"model": part})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [10**9, 9000])
def test_from_pretrained_gives_equal_logits(tmp_path: Path, kind: str, limit: int):
    run_ranks(save, 2, folder=str(tmp_path / "run"), kind=kind)
    model = tiny(kind)
    out = tmp_path / "out"
    export_hf(tmp_path / "run" / "step-00000001", out, config=model.config.to_dict(), max_shard_bytes=limit)
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert (out / "model.safetensors.index.json").exists() == (limit == 9000)


def test_bf16_export_equals_hugging_faces_own_conversion(tmp_path: Path):
    save(0, 1, str(tmp_path / "run"), "llama")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "theirs")
    theirs = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16).eval()
    config = model.config.to_dict()
    export_hf(tmp_path / "run" / "step-00000001", tmp_path / "out", config=config, dtype=torch.bfloat16)
    ours = type(model).from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = torch.arange(20).view(2, 10)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
