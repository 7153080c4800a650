"""Adapters over a frozen base of bf16, int8 or packed 4-bit weights: bit for bit what one process trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_core import ShardedOptimizer
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_zero import Zero, full_optimizer_state, full_tensor, gather

RANKS, WIDTH = 2, 16


class Codes(nn.Parameter):
    """A parameter class of somebody's own, as quantisers have them."""

    kind = "absmax"
    quant_state: Tensor


def codes(values: Tensor) -> Codes:
    made = torch.Tensor._make_subclass(Codes, values, False)
    assert isinstance(made, Codes)
    return made


class HalfBase(nn.Linear):
    """bf16 as it is."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.requires_grad_(False)


class Int8Base(nn.Module):
    """int8 with one fp32 scale for each row, a frozen parameter too."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(WIDTH, WIDTH)
        scale = whole.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((whole / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class FourBitBase(nn.Module):
    """Two 4-bit codes in a byte; the scale is a buffer, and where the quantiser left it: on the parameter."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = codes(torch.randint(0, 256, (WIDTH * WIDTH // 2,), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(WIDTH, 1) / 8)
        self.weight.quant_state = self.scale

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([self.weight >> 4, self.weight & 15], 1).view(WIDTH, WIDTH)
        assert self.weight.kind == "absmax"
        return F.linear(x, (pairs.to(x.dtype) - 8) * self.weight.quant_state.to(x.dtype))


BASES = {"bf16": HalfBase, "int8": Int8Base, "4bit": FourBitBase}


class Adapted(nn.Module):
    """A base layer with its adapter, and one without, whose weight the backward needs in any case."""

    def __init__(self, base: nn.Module, plain: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.plain = base, plain
        self.down, self.up = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if isinstance(self.base_layer, HalfBase) else x.dtype
        x = torch.tanh(self.base_layer(x.to(dtype)).to(x.dtype) + self.up(self.down(x)))
        return torch.tanh(self.plain(x.to(dtype)).to(x.dtype))


def build(base: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Adapted(BASES[base](), BASES[base]()) for _ in range(3)])


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("base", "stage", "after", "bucket"),
    [
        *((base, stage, False, 300) for base in BASES for stage in (1, 2, 3)),
        ("bf16", 1, True, 300),
        ("4bit", 3, True, 300),
        ("bf16", 3, False, 10**6),  # one frozen unit for all blocks, the first of which gets no gradient
    ],
)
@distributed(RANKS)
def test_lora_over_a_frozen_base(rank: int, base: str, stage: int, after: bool, bucket: int) -> None:
    """`after`: the base is sharded alone, and the adapters come when it has run already."""
    model, twin = build(base), build(base)
    parts = [(block.down, block.up) for block in model]
    if after:
        for block in model:
            block.down = block.up = nn.Identity()
    optimizer = torch.optim.AdamW(adapters(model) if not after else [nn.Parameter(torch.zeros(1))], lr=0.01)
    if after:
        optimizer.param_groups[0]["params"].clear()
    owner = Zero.model_validate({"stage": stage, "bucket_numel": bucket, "keep_numel": 200}).shard(model)
    sharded = ShardedOptimizer(optimizer, owner)
    if after:
        with torch.no_grad():
            model(torch.ones(1, WIDTH))
        for block, (down, up) in zip(model, parts, strict=True):
            block.down, block.up = down, up
        optimizer.add_param_group({"params": adapters(model)})
    reference = torch.optim.AdamW(adapters(twin), lr=0.01)
    for step in range(3):
        data = torch.randn(RANKS, 4, WIDTH, generator=torch.Generator().manual_seed(step))
        model(data[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for share in data:
            (twin(share).square().mean() / RANKS).backward()
        reference.step()
        reference.zero_grad()
    for name, wanted in twin.named_parameters():
        param = model.get_parameter(name)
        found = full_tensor(param)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted.detach()), name
        if wanted.requires_grad:
            moment = full_optimizer_state(sharded, param, "exp_avg")
            assert moment is not None
            assert_close_norm(moment, reference.state[wanted]["exp_avg"], 0.0)
    frozen = [unit for unit in owner.units if not unit.trainable]
    held = sum(unit.local.nbytes for unit in frozen)
    total = sum(p.nbytes for p in twin.parameters() if not p.requires_grad)
    padding = sum((unit.layout.numel - unit.layout.used_numel) * unit.dtype.itemsize for unit in frozen)
    assert held * RANKS == total + padding  # each byte on one rank, codes as bytes


@pytest.mark.parametrize("stage", [1, 3])
@distributed(RANKS)
def test_a_parameter_class_and_what_was_set_on_it_stay(stage: int) -> None:
    model = build("4bit")
    weight = model[0].base_layer.weight
    before = copy.deepcopy(weight.detach().as_subclass(Tensor))
    Zero.model_validate({"stage": stage, "bucket_numel": 1}).shard(model)
    assert model[0].base_layer.weight is weight
    assert type(weight) is Codes
    assert weight.quant_state is model[0].base_layer.scale
    model(torch.ones(1, WIDTH))
    with gather(weight):
        assert torch.equal(weight.detach().as_subclass(Tensor), before)
    model[0].requires_grad_(False)  # the unit is cut anew
    model[0].extra = nn.Linear(2, 2)
    model(torch.ones(1, WIDTH))
    assert type(weight) is Codes
    assert weight.quant_state is model[0].base_layer.scale
    assert torch.equal(full_tensor(weight).as_subclass(Tensor), before)
