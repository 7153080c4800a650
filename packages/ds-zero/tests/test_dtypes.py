"""Which dtype each parameter has: patterns that stay fp32, buffers as they are, integers never cast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ds_core import ShardedOptimizer
from ds_core.state.precision import Precision
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_zero import Zero, full_tensor


class Block(nn.Module):
    """Linear in the run's dtype, norm and head in fp32, with a buffer that no cast may touch."""

    fine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.register_buffer("fine", torch.tensor(1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.to(self.norm.weight.dtype))
        return torch.tanh(self.up(normed.to(self.up.weight.dtype))) * self.fine.to(x.dtype) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.to(block.up.weight.dtype))
        return self.head(x.to(self.head.weight.dtype)).float().square().mean()


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_patterns_stay_fp32_and_are_their_own_masters(rank: int, stage: int) -> None:
    torch.manual_seed(0)
    model = Net()
    masters, work = copy.deepcopy(model), copy.deepcopy(model)
    for name, param in work.named_parameters():
        if "norm" not in name and not name.startswith("head"):
            param.data = param.data.bfloat16()
    owner = Zero(stage=stage, dtype="bfloat16", bucket_numel=40, keep_fp32=("*norm*", "head")).shard(model)
    optimizer = ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), owner)
    reference = torch.optim.SGD(masters.parameters(), lr=0.1)
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in work.named_parameters()
    }
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    for unit in owner.units:
        assert unit.separate_master == (unit.dtype == torch.bfloat16)
    for step in range(3):
        data = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        model(data[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for share in data:
            work(share).backward()
            for master, param in zip(masters.parameters(), work.parameters(), strict=True):
                grad = param.grad
                assert grad is not None
                master.grad = grad.float() / 2 if master.grad is None else master.grad + grad.float() / 2
            work.zero_grad()
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for master, param in zip(masters.parameters(), work.parameters(), strict=True):
                param.copy_(master)
        found = {name: full_tensor(param, master=True) for name, param in model.named_parameters()}
        # the same operations on the same bits; (g0 + g1) / 2 and g0 / 2 + g1 / 2 differ by one rounding
        assert_close_norm(found, {n: p.detach() for n, p in masters.named_parameters()}, 1e-6)


@distributed(2)
def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep_fp32 pattern 'nrom' matches no parameter.*blocks\.0"):
        Zero(stage=1, dtype="bfloat16", keep_fp32=("*norm*", "nrom")).shard(Net())


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (
            "*norm*",
            ["blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.norm.weight", "blocks.1.norm.bias"],
        ),
        ("blocks.1.norm", ["blocks.1.norm.weight", "blocks.1.norm.bias"]),
        ("head", ["head.weight", "head.bias"]),
        ("*.bias", [f"blocks.{i}.{m}.bias" for i in range(2) for m in ("norm", "up")] + ["head.bias"]),
        ("*.head", ["head.weight", "head.bias"]),
        ("hea", []),
    ],
)
def test_a_pattern_names_parameters_or_modules_and_all_below(pattern: str, kept: list[str]) -> None:
    precision = Precision(torch.bfloat16, keep_fp32=(pattern,))
    named = dict(Net().named_parameters())
    assert [n for n, p in named.items() if precision.of_param(n, p) == torch.float32] == kept


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_integers_and_eight_bits_are_never_cast(dtype: torch.dtype) -> None:
    assert Precision(torch.bfloat16).of_param("codes", torch.zeros(2).to(dtype)) == dtype
