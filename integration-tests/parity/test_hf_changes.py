"""Five Hugging Face architectures that change while they train: resized, tied, adapted; as they do alone."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.testing.distributed import run_ranks
from ds_zero import full_tensor, gather, shard

sys.path.insert(0, str(Path(__file__).parent))
from test_hf import MODELS

LR, RELATIVE = 0.05, 2e-5  # of each tensor's norm, in fp32: as in test_hf
RANKS_IMPORT = ("transformers.modeling_utils",)
TARGETS = {
    "LlamaForCausalLM": ["q_proj", "down_proj"],
    "GPT2LMHeadModel": ["c_attn"],
    "MixtralForCausalLM": ["q_proj", "o_proj"],
    "T5ForConditionalGeneration": ["q", "wo"],
    "BertForMaskedLM": ["query", "dense"],
}


def build(name: str) -> Any:
    import transformers

    kind, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind)(**options))
    model.train()
    return model


class Both:
    """The sharded model and its twin on every rank's batches; what is done to one is done to the other."""

    def __init__(self, name: str, stage: int, *, adapted: bool = False) -> None:
        self.name, self.stage, self.count = name, stage, 0
        self.model, self.twin = build(name), build(name)
        if adapted:
            self.model, self.twin = self.adapt(self.model), self.adapt(self.twin)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=LR)
        self.reference = torch.optim.SGD([p for p in self.twin.parameters() if p.requires_grad], lr=LR)
        shard(self.model, self.optimizer, stage=stage)

    def adapt(self, model: Any) -> Any:
        import peft

        torch.manual_seed(7)
        config = peft.LoraConfig(
            r=2, lora_alpha=4, lora_dropout=0.0, target_modules=TARGETS[self.name], fan_in_fan_out=False
        )
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, param in adapted.named_parameters():
                if "lora_B" in name:
                    param.fill_(0.01)  # zero, as it starts, leaves nothing to compare
        return adapted

    def both(self, change: Any) -> None:
        for model in (self.model, self.twin):
            values = gather(model) if model is self.model and self.stage == 3 else contextlib.nullcontext()
            torch.manual_seed(3)
            with values:
                change(model)

    def train(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = [
            torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(10 * self.count + other))
            for other in range(world)
        ]
        self.count += 1
        self.model(input_ids=batches[rank], labels=batches[rank]).loss.backward()
        for batch in batches:
            (self.twin(input_ids=batch, labels=batch).loss / world).backward()
        for optimizer in (self.optimizer, self.reference):
            optimizer.step()
            optimizer.zero_grad()
        wanted = dict(self.twin.named_parameters())
        mine = dict(self.model.named_parameters())
        assert mine.keys() == wanted.keys()
        for name, param in mine.items():
            found, exact = full_tensor(param), wanted[name].detach()
            assert found.shape == exact.shape
            off = float((found - exact).norm())
            assert off <= RELATIVE * float(exact.norm()) + 1e-7, (
                f"step {self.count}, {name}: off by {off:.2e}"
            )


def change(name: str, stage: int) -> None:
    pair = Both(name, stage)
    pair.train()
    for size in (80, 56):
        pair.both(lambda model, size=size: model.resize_token_embeddings(size, mean_resizing=False))
        assert pair.model.get_input_embeddings().weight.shape[0] == size
        pair.train()
    for model in (pair.model, pair.twin):
        model.config.tie_word_embeddings = True
    pair.both(lambda model: model.tie_weights())
    pair.train()
    before = {id(param) for param in pair.model.parameters()}
    pair.model, pair.twin = pair.adapt(pair.model), pair.adapt(pair.twin)
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.reference)):
        optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    assert any(id(param) not in before for param in pair.model.parameters())
    pair.train()
    pair.train()
    first = Both(name, stage, adapted=True)
    first.train()
    first.train()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_an_architecture_that_changes_trains_as_it_does_alone(name: str, stage: int) -> None:
    run_ranks(change, 2, timeout=120.0, name=name, stage=stage)
