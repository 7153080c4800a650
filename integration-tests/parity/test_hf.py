"""Five Hugging Face architectures, untouched: training and greedy generation equal the unsharded model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.testing.distributed import run_ranks
from ds_zero import full_tensor, shard

RANKS_IMPORT = ("transformers.modeling_utils",)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 32}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", DECODER | ENDS),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **ENDS}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        DECODER | ENDS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "BertForMaskedLM": (
        "BertConfig",
        SMALL | {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}
STEPS, LR, RELATIVE = 2, 0.05, 2e-5  # of each tensor's norm, in fp32


def ids(step: int, rank: int) -> torch.Tensor:
    return torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(10 * step + rank))


def train(name: str, stage: int) -> None:
    import transformers

    rank, world = dist.get_rank(), dist.get_world_size()
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind)(**options))
    model.train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    shard(model, optimizer, stage=stage)
    assert (model.dtype, model.num_parameters()) == (torch.float32, twin.num_parameters())
    reference = torch.optim.SGD(twin.parameters(), lr=LR)
    for step in range(STEPS):
        mine = ids(step, rank)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches = [ids(step, other) for other in range(world)]
        torch.stack([twin(input_ids=batch, labels=batch).loss for batch in batches]).mean().backward()
        reference.step()
        reference.zero_grad()
        for name_of, wanted in twin.named_parameters():
            off = float((full_tensor(model.get_parameter(name_of)) - wanted.detach()).norm())
            assert off <= RELATIVE * float(wanted.norm()) + 1e-7, f"step {step}, {name_of}: off by {off:.2e}"
    state, wanted_state = model.state_dict(), twin.state_dict()
    assert state.keys() == wanted_state.keys()
    if not model.can_generate() or name == "BertForMaskedLM":
        return
    model.load_state_dict(wanted_state)  # the same bits, so that a tie cannot fall the other way
    model.eval()
    twin.eval()
    prompt = ids(9, 0)[:, :4]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **settings), twin.generate(prompt, **settings))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_an_architecture_trains_and_generates_as_it_does_alone(name: str, stage: int) -> None:
    run_ranks(train, 2, timeout=120.0, name=name, stage=stage)
