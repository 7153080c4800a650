"""Models built on the meta device become real unit by unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.state.unit import FlatUnit
from ds_core.testing.distributed import distributed
from ds_core.testing.models import Residual, TinyLM
from ds_zero import Zero, full_tensor, materialize, shard


class Plain(nn.Module):
    """Modules that all know how to reset themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Residual(8, 12) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_values_equal_those_of_a_model_built_for_real(rank: int, stage: int) -> None:
    with torch.device("meta"):
        model = Plain()
    torch.manual_seed(7 + rank)  # rank 0's values win
    Zero(stage=stage, bucket_numel=1).shard(model)
    torch.manual_seed(7)
    reference = Plain()
    for name, param in reference.named_parameters():
        assert torch.equal(full_tensor(model.get_parameter(name)), param), name


@pytest.mark.parametrize("noted", [False, True])
@distributed(world_size=2)
def test_never_more_than_one_unit_is_whole(rank: int, noted: bool) -> None:
    with materialize() if noted else torch.device("meta"):
        model = Plain()
    assert all(param.is_meta for param in model.parameters())
    whole: list[int] = []
    adopt = FlatUnit.adopt

    def counting(self: FlatUnit, flat: torch.Tensor, store: object) -> None:
        adopt(self, flat, store)  # type: ignore[arg-type]
        whole.append(sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta))

    FlatUnit.adopt = counting  # type: ignore[method-assign]
    try:
        Zero(stage=3, bucket_numel=1).shard(model)
    finally:
        FlatUnit.adopt = adopt  # type: ignore[method-assign]
    assert max(whole) < 4 * sum(p.numel() for p in model.blocks[0].parameters())


@distributed(world_size=1)
def test_an_optimizer_made_on_meta_parameters_follows_them(rank: int) -> None:
    with torch.device("meta"):
        model = Plain()
    model, optimizer = shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)
    before = full_tensor(model.head.weight)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(full_tensor(model.head.weight), before)


class Silent(nn.Module):
    """Cannot reset itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


@distributed(world_size=1)
def test_what_nobody_can_fill_is_named(rank: int) -> None:
    with torch.device("meta"):
        silent, buffered = nn.Sequential(Silent(), nn.Linear(3, 3)), TinyLM(tied=False)
    with pytest.raises(ValueError, match=r"module 0 \(Silent\).*no reset_parameters"):
        Zero(stage=1).shard(silent)
    with pytest.raises(ValueError, match=r"buffer 'scale' of module the root .*nothing says how to fill"):
        Zero(stage=1).shard(buffered)
    with torch.device("meta"):
        silent = nn.Sequential(Silent(), nn.Linear(3, 3))
    Zero(stage=3, initializer=_ones).shard(silent)
    assert torch.equal(full_tensor(silent[0].gain), torch.ones(3))


@distributed(world_size=1)
def test_more_tensor_than_memory_is_said_before_any_is_taken(rank: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(200_000, 200_000, bias=False) for _ in range(4)])
    with pytest.raises(ValueError, match=r"does not fit(.|\n)*change:"):
        Zero(stage=3).shard(model)
    assert all(p.is_meta for p in model.parameters())


def _ones(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        nn.init.ones_(param)
