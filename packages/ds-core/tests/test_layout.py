"""Layouts tile their buckets, and every flat range reassembles from its boxes."""

from __future__ import annotations

import math

import pytest
import torch

from ds_core.state.layout import flat_range_boxes, plan_layout

SHAPES = [(), (1,), (9,), (7, 5), (1, 6), (3, 4, 5), (2, 1, 3), (2, 3, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_reassembles_from_few_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            boxes = flat_range_boxes(shape, start, end)
            parts = [
                whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
                for offsets, sizes in boxes
            ]
            got = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            assert torch.equal(got, torch.arange(start, end))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("cut", ["flat", "whole"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shards_tile_every_slot(cut: str, world: int) -> None:
    shapes = [("a", (3, 5)), ("b", ()), ("c", (11,)), ("d", (2, 2, 2)), ("e", (1,))]
    layout = plan_layout(shapes, world, cut=cut)  # type: ignore[arg-type]
    assert layout.numel == layout.shard_numel * world
    covered = {name: [0] * math.prod(shape) for name, shape in shapes}
    for rank in range(world):
        for overlap in layout.overlaps(rank):
            low, high = overlap.local
            assert 0 <= low < high <= layout.shard_numel
            if cut == "whole":
                assert high - low == overlap.slot.numel
            for offset in range(high - low):
                covered[overlap.slot.fqn][overlap.begin + offset] += 1
    assert all(count == 1 for counts in covered.values() for count in counts)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_flat_padding_is_less_than_a_quantum(world: int) -> None:
    for numel in range(1, 70):
        layout = plan_layout([("p", (numel,))], world, align=4)
        assert 0 <= layout.numel - numel < world * 4
        assert layout.used_numel == numel


def test_whole_cut_balances_ranks() -> None:
    layout = plan_layout(
        [(str(i), (n,)) for i, n in enumerate([8, 1, 7, 2, 6, 3, 5, 4])], 2, align=1, cut="whole"
    )
    assert layout.shard_numel == 18


def test_bad_world_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got world=0"):
        plan_layout([("a", (1,))], 0)
