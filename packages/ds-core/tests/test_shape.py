"""Parameter counts of published models, from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from ds_core.setup.shape import Dims, Shape, Use, within
from ds_core.testing.models import CASES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 50257,
    "n_positions": 1024,
}
LLAMA3 = {**LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA, 6_738_415_616),  # Llama 2 7B
        (LLAMA3, 8_030_261_248),  # Llama 3 8B
        (GPT2, 124_439_808),
        (QWEN2, 494_032_768),  # Qwen2 0.5B
        (MIXTRAL, 46_702_792_704),  # Mixtral 8x7B
        (QWEN3_MOE, 30_532_122_624),  # Qwen3 30B A3B
    ],
)
def test_published_models_are_counted_exactly(config: dict[str, object], parameters: int) -> None:
    assert Shape.from_config(config).numel == parameters


def test_a_file_or_its_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert (
        Shape.from_config(tmp_path) == Shape.from_config(tmp_path / "config.json") == Shape.from_config(LLAMA)
    )
    with pytest.raises(FileNotFoundError, match=r"no model config .*; allowed: a config\.json"):
        Shape.from_config(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list; allowed: an object"):
        Shape.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Shape.from_config(tmp_path)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        LookupError, match=r"no hidden_size\|n_embd\|d_model, no vocab_size: not a transformer"
    ):
        Dims.from_config({"num_hidden_layers": 2, "num_attention_heads": 2})


def test_blocks_are_units_and_a_tied_head_uses_the_first_again() -> None:
    shape = Shape.from_config(QWEN2)
    assert len(shape.units) == 1 + 24 + 1
    assert (shape.uses[0], shape.uses[-1]) == (Use(0, lookup=True), Use(0))
    assert shape.looked_up == set()
    assert Shape.from_config(LLAMA).looked_up == {0}


def test_a_module_is_cut_as_its_owner_cuts_it() -> None:
    shape = Shape.of(CASES["tied"].build(), bucket_numel=1)
    assert shape.uses[0].lookup
    assert shape.order[-1] == 0
    frozen = Shape.of(CASES["frozen"].build(), bucket_numel=1)
    assert {unit.trainable for unit in frozen.units} == {True, False}
    assert Shape.of(nn.Linear(3, 5)).numel == 20


def test_a_unit_is_padded_as_the_layout_pads() -> None:
    unit = Shape.of(nn.Linear(3, 5), bucket_numel=1).units[0]
    assert (unit.numel, unit.padded(1), unit.padded(3)) == (20, 24, 24)
    assert [unit.owned(3, rank) for rank in range(3)] == [8, 8, 4]
    assert sum(unit.owned(3, rank, "whole") for rank in range(3)) == 20


def test_the_first_always_fits_where_there_is_room() -> None:
    assert within([0, 1, 2], [5, 3, 3], 0) == []
    assert within([0, 1, 2], [5, 3, 3], 1) == [0]
    assert within([1, 1, 2], [5, 3, 3], 6) == [1, 2]
