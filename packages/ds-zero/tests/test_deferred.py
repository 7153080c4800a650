"""Models built inside `materialize()` hold no parameters, and get what their constructors wrote."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ds_core.testing.distributed import distributed, run_ranks
from ds_zero import Zero, full_tensor, materialize, shard
from ds_zero.compat import Init


class Scaled(nn.Module):
    """Writes to its parameters in every way that constructors do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width, padding_idx=3)
        self.gain = nn.Parameter(torch.full((width,), 2.0))
        self.noise = nn.Parameter(torch.randn(4, width) * 0.5)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 2)
        self.head = nn.Linear(width, 12, bias=False)
        self.register_buffer("frequencies", 1.0 / 10 ** torch.arange(4.0), persistent=False)
        self.apply(self._first)
        for number, block in enumerate(self.blocks):
            nn.init.constant_(block.weight, number + 0.5)
            with torch.no_grad():
                block.weight[0, 1:3] = 7.0
                block.weight.data.mul_(2)
                block.bias.copy_(torch.arange(float(width)))
        nn.init.eye_(self.head.weight)
        self.head.weight = self.embed.weight
        self.late = nn.Linear(width, width)
        nn.init.trunc_normal_(self.late.weight, std=0.1, a=-0.2, b=0.2)
        self.late.bias = nn.Parameter(torch.ones(width))

    def _first(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.gain + self.noise.sum(0)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.late(x + self.attention(x, x, x)[0]))


def built(stage: int, buckets: int) -> list[float]:
    with materialize():
        model = Scaled()
    assert all(param.is_meta for param in model.parameters())
    assert torch.equal(model.frequencies, Scaled().frequencies)
    torch.manual_seed(5)
    Zero(stage=stage, bucket_numel=buckets).shard(model)
    assert model.head.weight is model.embed.weight
    return [float(x) for param in model.parameters() for x in full_tensor(param).view(-1)]


def test_values_are_the_same_at_every_stage_and_world_size() -> None:
    wanted = run_ranks(built, 1, stage=1, buckets=100)[0]
    for world in (1, 2, 3):
        for values in run_ranks(built, world, stage=3, buckets=100):
            assert values == wanted


def trained(stage: int) -> list[float]:
    torch.manual_seed(0)
    with materialize():
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    torch.manual_seed(3)
    model, optimizer = shard(model, torch.optim.AdamW(model.parameters(), lr=0.1), stage=stage)
    losses = []
    for step in range(3):
        loss = model(torch.full((2, 4), float(step))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_a_materialised_model_trains_alike_at_every_stage_and_world_size() -> None:
    wanted = run_ranks(trained, 1, stage=1)[0]
    for stage, world in ((2, 2), (3, 2), (3, 3)):
        for losses in run_ranks(trained, world, stage=stage):
            assert losses == pytest.approx(wanted, rel=1e-5)  # sums of 2 or 3 equal gradients, in fp32


@distributed(1)
def test_what_a_constructor_wrote_is_there() -> None:
    torch.manual_seed(0)
    reference = Scaled()
    torch.manual_seed(0)
    with materialize():
        model = Scaled()
    Zero(stage=3, bucket_numel=1).shard(model)
    exact = [name for name, _ in reference.named_parameters() if name.startswith("blocks") or "bias" in name]
    for name in [*exact, "gain"]:
        assert torch.equal(full_tensor(model.get_parameter(name)), reference.get_parameter(name)), name
    assert 0.3 < float(full_tensor(model.noise).std()) < 0.7
    embed = full_tensor(model.embed.weight)
    assert not embed[3].any()
    assert 0.7 < float(embed[4:].std()) < 1.3
    late = full_tensor(model.late.weight)
    assert float(late.abs().max()) <= 0.2
    assert float(late.std()) > 0.05
    bound = math.sqrt(6 / (8 + 24))  # xavier_uniform_ of a [24, 8] matrix
    assert bound / 2 < float(full_tensor(model.attention.in_proj_weight).abs().max()) <= bound
    assert model(torch.arange(12)).isfinite().all()


@distributed(2)
def test_recurrent_modules_use_the_parameters_they_were_given(rank: int) -> None:
    with materialize():
        model = nn.LSTM(4, 6, num_layers=2)
    Zero(stage=3).shard(model)
    output, _ = model(torch.ones(3, 4))
    output.sum().backward()
    weights = {id(param) for param in model.parameters()}
    assert {id(weight) for weight in model._flat_weights} == weights


@distributed(1)
def test_copies_are_filled_too() -> None:
    with materialize():
        layer = nn.Linear(6, 6)
        nn.init.constant_(layer.bias, 3.0)
        model = nn.ModuleList([layer, copy.deepcopy(layer)])
        nn.init.constant_(model[1].weight, 4.0)
    twin = copy.deepcopy(model)
    for sharded in (model, twin):
        Zero(stage=3).shard(sharded)
        assert torch.equal(full_tensor(sharded[1].weight), torch.full((6, 6), 4.0))
        assert torch.equal(full_tensor(sharded[1].bias), torch.full((6,), 3.0))
        assert 0 < float(full_tensor(sharded[0].weight).abs().max()) <= 6**-0.5


class Derived(nn.Module):
    """One weight comes from another one's values, and one from a matrix decomposition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Parameter(torch.empty(3, 3))
        self.third = nn.Parameter(torch.empty(4, 3))
        with torch.no_grad():
            self.second.copy_(self.first.weight.t() * 2)
        nn.init.orthogonal_(self.third)


@distributed(1)
def test_values_that_are_computed_on_the_way(rank: int) -> None:
    with materialize():
        model, apart = Derived(), Derived()
    Zero(stage=3).shard(model)
    assert torch.equal(full_tensor(model.second), full_tensor(model.first.weight).t() * 2)
    third = full_tensor(model.third)
    torch.testing.assert_close(third.t() @ third, torch.eye(3))
    with pytest.raises(ValueError, match=r"initialised from another one that is in another unit"):
        Zero(stage=3, bucket_numel=1).shard(nn.ModuleDict({"a": apart.first, "b": Holder(apart.second)}))


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@distributed(1)
def test_what_cannot_be_done_later_is_refused_by_name() -> None:
    outside = torch.ones(3, 3, device="meta")
    with materialize():
        strange, plain = Holder(nn.Parameter(torch.ones(3, 3))), nn.Linear(3, 3)
        with torch.no_grad():
            strange.weight.copy_(outside)
    with pytest.raises(ValueError, match=r"the root \(Holder\).*values from the meta device"):
        Zero(stage=1).shard(strange)
    nn.init.ones_(plain.weight)
    with pytest.raises(ValueError, match=r"'weight' of module the root \(Linear\) .* the write is lost"):
        Zero(stage=1).shard(plain)


def test_a_context_inside_another_and_one_that_is_off() -> None:
    with materialize(), materialize():
        inner = nn.Linear(2, 2)
    with materialize(enabled=False):
        real = nn.Linear(2, 2)
    assert inner.weight.is_meta
    assert not real.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_zero_init_takes_what_means_something() -> None:
    with Init(dtype=torch.bfloat16, config_dict_or_path={"zero_optimization": {"stage": 3}}):
        model = nn.Linear(2, 2)
    assert (model.weight.device.type, model.weight.dtype) == ("meta", torch.bfloat16)
    with Init(enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ValueError, match=r"zero.Init cannot take remote_device='nvme': .*offload"):
        Init(remote_device="nvme")
    with pytest.raises(ValueError, match=r"zero.Init cannot take module: .*Zero\(stage=3\).shard"):
        Init(module=model)
