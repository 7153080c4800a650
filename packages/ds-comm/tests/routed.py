"""For tests of routes: an owner whose units are cut, and units with gradients that a rank's number makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_core import ReplicatedOwner
from ds_core.ground.wire import Codec
from ds_core.state.owner import FlatOwner
from ds_core.state.precision import Precision
from ds_core.state.unit import FlatUnit

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


class Cut(FlatOwner):
    """Cut as at stage 1; who gathers calls the route."""

    stage = 1


def build(width: int = 37) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(11, width), nn.Linear(width, 13))


def own(stage: int, **options: Any) -> FlatOwner:
    """Stage 0: nothing is cut; stage 1: shards of masters and gradients, whole copies."""
    if stage == 0:
        return ReplicatedOwner(build(), bucket_numel=1000, **options)
    return Cut(
        build(), None, sharded=True, whole_grads=True, precision=Precision(), bucket_numel=1000, **options
    )


def gradient(unit: FlatUnit, rank: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[numel] of one rank: random in the parameters, zero in the padding."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    full = torch.zeros(unit.layout.numel)
    for slot in unit.layout.slots:
        full[slot.start : slot.end] = torch.randn(slot.numel, generator=generator)
    return full.to(dtype)


def coded(codec: Codec, rows: Tensor) -> Tensor:
    """What [rows, n] come back as, fp32."""
    wire = torch.empty(len(rows), codec.wire_bytes(rows.shape[1]), dtype=torch.uint8)
    codec.encode(rows, wire)
    out = torch.empty(rows.shape)
    codec.decode(wire, out)
    return out


def in_order(parts: list[Tensor]) -> Tensor:
    """Their sum in fp32, first to last, from zero as the kernels do."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


def two_hops(given: list[Tensor], intra: Codec, inter: Codec, node: int) -> tuple[Tensor, list[Tensor]]:
    """The sum [world * n] of [world * n] of each rank, as two hops round it, and what each rank lost."""
    world, nodes = len(given), len(given) // node
    lost = [part.clone().view(nodes, node, -1) for part in given]
    total = torch.empty_like(lost[0])
    for place in range(node):
        sums = []
        for first in range(0, world, node):
            decoded = [
                coded(intra, given[r].view(nodes, node, -1)[:, place]) for r in range(first, first + node)
            ]
            for rank, values in enumerate(decoded, first):
                lost[rank][:, place] -= values
            sums.append(in_order(decoded))
        rounded = [coded(inter, each) for each in sums]
        for at, (each, values) in enumerate(zip(sums, rounded, strict=True)):
            lost[at * node + place][:, place] += each - values
        total[:, place] = in_order(rounded)
    return total.view(-1), [each.view(-1) for each in lost]
