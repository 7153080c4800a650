"""A tiled layer is the layer, and one tile of it at a time is whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_core.state.units import plan_units
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_core.train.optim import ShardedOptimizer
from ds_zero import TiledLinear, Zero, full_tensor, shard

SPLITS = [(1, 1), (1, 4), (3, 1), (3, 4)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 23), nn.Linear(23, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Large layers inside of blocks, and a large head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(10, 17)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def build(in_splits: int = 1, out_splits: int = 1) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
    if in_splits * out_splits > 1:
        for holder, name in [(b, n) for b in model.blocks for n in ("up", "down")] + [(model, "head")]:
            linear = getattr(holder, name)
            setattr(holder, name, TiledLinear.from_linear(linear, in_splits=in_splits, out_splits=out_splits))
    return model


def joined(named: dict[str, Tensor], reference: nn.Module) -> dict[str, Tensor]:
    """Tiles put back together under the names of the untiled model."""
    found = {}
    for name, module in reference.named_modules():
        tiles = sorted(
            {int(n.split(".tiles.")[1].split(".")[0]) for n in named if n.startswith(f"{name}.tiles.")}
        )
        if not tiles:
            found |= {
                f"{name}.{k}": named[f"{name}.{k}"] for k in module._parameters if f"{name}.{k}" in named
            }
            continue
        weights = [named[f"{name}.tiles.{tile}.weight"] for tile in tiles]
        biases = [named[key] for tile in tiles if (key := f"{name}.tiles.{tile}.bias") in named]
        columns = len(tiles) // len(biases)
        rows = [torch.cat(weights[i : i + columns], 1) for i in range(0, len(tiles), columns)]
        found |= {f"{name}.weight": torch.cat(rows), f"{name}.bias": torch.cat(biases)}
    return found


def batch(seed: int, rank: int) -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)).chunk(2)[rank]


@pytest.mark.parametrize("splits", SPLITS)
def test_it_is_the_layer(splits: tuple[int, int]) -> None:
    """Each output is a dot product of n=10 terms in some order: |d| <= n u sum |x w|, twice that for two."""
    linear = nn.Linear(10, 17, dtype=torch.float64)
    tiled = TiledLinear.from_linear(linear, in_splits=splits[0], out_splits=splits[1])
    x = torch.randn(5, 10, dtype=torch.float64)
    bound = 2 * 11 * 2.0**-53 * (x.abs() @ linear.weight.abs().T + linear.bias.abs())
    gap = (tiled(x) - linear(x)).abs()
    assert bool((gap <= bound).all())
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in linear.parameters())
    assert_close_norm(
        joined({f"x.{n}": p for n, p in tiled.named_parameters()}, nn.ModuleDict({"x": linear})),
        {f"x.{n}": p for n, p in linear.named_parameters()},
        0.0,
    )


@distributed(world_size=2)
def test_training_with_tiles_is_training(rank: int) -> None:
    reference = build()
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for step in range(3):
        for part in range(2):
            (reference(batch(step, part)).square().mean() / 2).backward()
        plain.step()
        plain.zero_grad()
    for stage in (1, 3):
        model = build(3, 2)
        model, optimizer = shard(model, torch.optim.AdamW(model.parameters(), lr=0.01), stage=stage)  # type: ignore[assignment]
        for step in range(3):
            model(batch(step, rank)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = joined({name: full_tensor(p) for name, p in model.named_parameters()}, reference)
        assert_close_norm(found, {n: p.detach() for n, p in reference.named_parameters()}, 1e-5)


def test_every_tile_is_a_unit_wherever_it_is() -> None:
    model = build(3, 4)
    plans = plan_units(model)
    tiles = [plan for plan in plans if ".tiles." in plan.key]
    assert len(tiles) == 5 * 12
    assert all(plan.users == (plan.key.rpartition(".")[0],) for plan in tiles)
    rest = [plan for plan in plans if ".tiles." not in plan.key]
    assert [plan.users for plan in rest] == [("blocks.0", "blocks.1")]  # the norms, put together
    assert {name for name, _ in rest[0].params} == {
        f"blocks.{i}.norm.{k}" for i in (0, 1) for k in ("weight", "bias")
    }


@pytest.mark.parametrize(("prefetch", "tiles"), [(0, 1), (1, 2)])
@distributed(world_size=2)
def test_no_more_than_one_tile_is_whole(prefetch: int, tiles: int, rank: int) -> None:
    """What is gathered at once, over two steps, is one tile; with prefetching the next one too."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), TiledLinear(16, 64, out_splits=4, in_splits=2))
    owner = Zero(stage=3, prefetch_numel=prefetch, keep_numel=0, bucket_numel=1).shard(model)
    optimizer = ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), owner)
    units = [unit for unit in owner.units if ".tiles." in unit.key]
    assert len(units) == 8
    peak, launch = 0, owner.gatherer.launch

    def watched(unit: Any) -> None:
        nonlocal peak
        launch(unit)
        peak = max(peak, sum(u.whole.untyped_storage().nbytes() for u in units))

    owner.gatherer.launch = watched  # type: ignore[method-assign]
    for _ in range(2):
        model(torch.randn(3, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    largest = max(unit.layout.numel for unit in units) * 4
    assert largest == 4 * (16 * 8 + 16)  # 16 x 8 elements and a bias
    assert 0 < peak <= tiles * largest
    assert dist.get_world_size() == 2


def test_on_meta_it_takes_no_memory_and_starts_as_the_layer_would() -> None:
    with torch.device("meta"):
        tiled = TiledLinear.from_linear(
            nn.Linear(1 << 20, 1 << 20, dtype=torch.bfloat16), in_splits=4, out_splits=8
        )
    assert len(tiled.tiles) == 32
    assert tiled.tile(0).weight.shape == (1 << 17, 1 << 18)
    assert tiled.tile(0).weight.dtype is torch.bfloat16
    assert (tiled.tile(0).bias is not None, tiled.tile(1).bias) == (True, None)
    assert "8 x 4 tiles" in repr(tiled)
    started = TiledLinear(400, 4, in_splits=4)
    assert (
        0.049 < float(started.tile(3).weight.detach().abs().max()) <= 0.05
    )  # 1 / sqrt(400), not of a tile's 100
    with pytest.raises(ValueError, match="out_splits must be from 1 to out_features=4, got 5"):
        TiledLinear(8, 4, out_splits=5)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert not any(
        p.requires_grad for p in TiledLinear.from_linear(frozen, in_splits=2, out_splits=2).parameters()
    )
