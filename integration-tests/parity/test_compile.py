"""Compiled blocks: no graph break, no second compilation, the numbers of the twin at every stage."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ds_core import ShardedOptimizer, checkpoint_blocks
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES
from ds_core.testing.parity import Twin, assert_close_norm
from ds_zero import Zero, compile_blocks, full_grad, full_tensor, shard

RANKS_IMPORT = ("torch._inductor.pattern_matcher", "networkx")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p, master=p.requires_grad) for name, p in model.named_parameters()}


def train(case: str, model: nn.Module, optimizer: Any, steps: range, rank: int) -> None:
    for step in steps:
        CASES[case].losses(model, CASES[case].rank_batch(step, rank, 2))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


GRAPHS = {"tied": 1, "frozen": 3, "checkpoint_non_reentrant": 1}
STAGES = {"tied": (0, 1, 2, 3), "frozen": (1, 3), "checkpoint_non_reentrant": (3,)}


@pytest.mark.parametrize("case", GRAPHS)
@distributed(world_size=2)
def test_compiled_blocks_equal_the_twin_in_one_graph_each(case: str, rank: int) -> None:
    for stage in STAGES[case]:
        compare(case, stage, rank, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ with g++, which is not here")
@distributed(world_size=2, timeout=180.0)
def test_inductor_compiles_blocks_at_stage_three(rank: int) -> None:
    compare("tied", 3, rank, "inductor")


def compare(case: str, stage: int, rank: int, backend: str) -> None:
    """Sums run in another order in the backward's graph and in inductor's kernels: fp32's 1e-5.

    A kind of block is one graph; frozen parameters make blocks differ, and with them their graphs.
    """
    twin = Twin(CASES[case], adamw, ranks=2, zero_unused=False)
    for step in range(5):
        twin.step([CASES[case].make_batch(step, 2)])
    torch._dynamo.reset()
    counters.clear()
    model = CASES[case].build()
    model, optimizer = shard(model, adamw(model), stage=stage)
    compile_blocks(model, backend=backend, fullgraph=True)
    train(case, model, optimizer, range(1), rank)
    assert counters["stats"]["unique_graphs"] == GRAPHS[case]
    train(case, model, optimizer, range(1, 5), rank)
    assert counters["stats"]["unique_graphs"] == GRAPHS[case]  # letting parameters go invalidates no guard
    assert dict(counters["graph_break"]) == {}
    assert_close_norm(masters(model), twin.parameters(), 1e-5)


@distributed(world_size=2)
def test_prefetching_letting_go_and_evaluating_compile_nothing_twice(rank: int) -> None:
    """Small units, none of them kept into the backward; one graph for training and one for evaluation."""
    torch._dynamo.reset()
    counters.clear()
    model = CASES["mlp"].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    owner = Zero(stage=3, bucket_numel=1, keep_numel=0).shard(model)
    compiled = compile_blocks(model, backend="aot_eager")

    sharded = ShardedOptimizer(optimizer, owner)
    for epoch in range(3):
        for step in range(2):
            CASES["mlp"].losses(model, CASES["mlp"].rank_batch(2 * epoch + step, rank, 2))[0].backward()
            sharded.step()
            sharded.zero_grad()
        with torch.no_grad():
            CASES["mlp"].losses(model, CASES["mlp"].rank_batch(0, rank, 2))
        assert counters["stats"]["unique_graphs"] == 2
    assert dict(counters["graph_break"]) == {}
    compiled.remove()
    assert not any("forward" in vars(block) for block in model.modules())


@distributed(world_size=2)
def test_compiling_hooks_and_all_breaks_the_graph_but_not_the_numbers(rank: int) -> None:
    """`block.compile()` and `model.compile()` trace hooks too; ours stay calls between graphs."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says that it gives up on our hooks
    twin = Twin(CASES["tied"], adamw, ranks=2, zero_unused=False)
    for step in range(2):
        twin.step([CASES["tied"].make_batch(step, 2)])
    for stage, whole in ((1, True), (3, False), (3, True)):
        torch._dynamo.reset()
        counters.clear()
        model = CASES["tied"].build()
        model, optimizer = shard(model, adamw(model), stage=stage)
        for module in [model] if whole else model.get_submodule("blocks").children():
            module.compile(backend="aot_eager")
        train("tied", model, optimizer, range(2), rank)
        assert_close_norm(masters(model), twin.parameters(), 1e-5)
        assert counters["stats"]["unique_graphs"] >= 1
        assert sum(counters["graph_break"].values()) > 0


@distributed(world_size=2)
def test_a_hugging_face_model_compiles_and_recomputes_its_layers(rank: int) -> None:
    """Three Llama layers are one graph, run again in the backward with the gradients of one plain process."""
    transformers = pytest.importorskip("transformers", reason="a test of transformers' own models")
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    tokens = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0))

    def grads(sharded: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
        if sharded:
            shard(model, adamw(model), stage=3)
            compile_blocks(model, backend="aot_eager", fullgraph=True)
            checkpoint_blocks(model)
        rows = tokens[rank : rank + 1] if sharded else tokens
        model(input_ids=rows, labels=rows).loss.backward()
        found = {n: full_grad(p) if sharded else p.grad for n, p in model.named_parameters()}
        return {name: grad for name, grad in found.items() if grad is not None}

    expected = grads(sharded=False)
    torch._dynamo.reset()
    counters.clear()
    assert_close_norm(grads(sharded=True), expected, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert dict(counters["graph_break"]) == {}
