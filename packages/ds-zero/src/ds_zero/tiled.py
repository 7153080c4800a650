"""A linear layer in tiles that are gathered one at a time, for layers larger than memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TiledLinear(nn.Module):
    """y = x W^T + b with W cut into `out_splits` x `in_splits` tiles, each a unit of its own.

    At stage 3 a rank holds one tile whole at a time, in the forward and in the backward, or two where the
    next one is fetched ahead (`Zero(prefetch_numel=0)` fetches none). Sizes need not divide. Cutting outputs
    leaves each number the same sum; cutting inputs adds `in_splits` partial sums, each rounded to the dtype.
    Raises ValueError for more splits than features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        in_splits: int = 1,
        out_splits: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for what, splits, size in (("in", in_splits, in_features), ("out", out_splits, out_features)):
            if not 1 <= splits <= size:
                raise ValueError(f"{what}_splits must be from 1 to {what}_features={size}, got {splits}")
        self.in_features, self.out_features = in_features, out_features
        self.in_sizes, self.out_sizes = _sizes(in_features, in_splits), _sizes(out_features, out_splits)
        self.tiles = nn.ModuleList(
            Tile(cols, rows, bias=bias and column == 0, fan_in=in_features)
            for rows in self.out_sizes
            for column, cols in enumerate(self.in_sizes)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, in_splits: int = 1, out_splits: int = 1) -> TiledLinear:
        """The same layer in tiles: copies of its values, on its device, in its dtype. Before sharding."""
        sizes = (linear.in_features, linear.out_features)
        with torch.device("meta"):
            tiled = cls(*sizes, in_splits=in_splits, out_splits=out_splits, bias=linear.bias is not None)
        weight, bias = linear.weight, linear.bias
        tiled.to_empty(device=weight.device).to(weight.dtype)
        tiled.requires_grad_(weight.requires_grad)
        if weight.is_meta:
            return tiled
        with torch.no_grad():
            columns = len(tiled.in_sizes)
            for row, rows in enumerate(weight.split_with_sizes(tiled.out_sizes)):
                for column, values in enumerate(rows.split_with_sizes(tiled.in_sizes, dim=1)):
                    tiled.tile(row * columns + column).weight.copy_(values)
            for row, values in enumerate(bias.split_with_sizes(tiled.out_sizes) if bias is not None else ()):
                tiled.tile(row * columns).bias.copy_(values)
        return tiled

    def tile(self, index: int) -> Tile:
        """Tiles in order: all of the first outputs, then of the next. The first of each row has the bias."""
        found = self.tiles[index]
        assert isinstance(found, Tile)
        return found

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split_with_sizes(self.in_sizes, dim=-1)
        rows = []
        for start in range(0, len(self.tiles), len(parts)):
            total: Tensor | None = None
            for column, part in enumerate(parts):
                # An alias of its own: with its gradient the tile's backward has ended, and the tile can go.
                product = self.tiles[start + column](part.view_as(part))
                total = product if total is None else total + product
            assert total is not None
            rows.append(total)
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {len(self.out_sizes)} x {len(self.in_sizes)} tiles"
        )


class Tile(nn.Linear):
    """One tile: a unit by itself, initialised as a part of the layer that it is of."""

    own_unit = True

    def __init__(self, in_features: int, out_features: int, *, bias: bool, fan_in: int) -> None:
        self.fan_in = fan_in
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """nn.Linear's: uniform within 1 / sqrt(the whole layer's inputs)."""
        bound = 1.0 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


def _sizes(total: int, splits: int) -> list[int]:
    """As even as can be, larger ones first."""
    return [total // splits + (index < total % splits) for index in range(splits)]
