"""Packed shards: bytes, rounding, and what may be done with the tensor that stands for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_core.state.layout import BucketLayout, plan_layout
from ds_kernels import dequantize_blocks, quantize_blocks
from ds_offload import Tiered, Volume
from ds_offload.moves import Moves
from ds_offload.policy import Split
from ds_offload.quantized import (
    BLOCK,
    PackedHome,
    PackedShard,
    PackedWeightsError,
    WeightFormat,
    plan_packing,
)

SHAPES = [("norm", (70,)), ("first", (33, 65)), ("bias", (33,)), ("second", (64, 130)), ("last", (5,))]
FORMATS: list[WeightFormat] = ["int8", "int4"]


def rounded(values: Tensor, layout: BucketLayout, rank: int, format: WeightFormat) -> Tensor:
    """The definition: every matrix of the shard on its own, the rest untouched."""
    out = values.clone()
    for overlap in layout.overlaps(rank):
        if len(overlap.slot.shape) > 1:
            part = slice(*overlap.local)
            out[part] = dequantize_blocks(quantize_blocks(values[part], format=format, block=BLOCK))
    return out


def packed(
    dtype: torch.dtype, format: WeightFormat, rank: int, tier: str, folder: Path
) -> tuple[PackedHome, Tensor, BucketLayout]:
    layout = plan_layout([(name, torch.Size(shape)) for name, shape in SHAPES], 2)
    values = torch.randn(layout.shard_numel, generator=torch.Generator().manual_seed(rank)).to(dtype)
    packing = plan_packing(layout, rank, dtype, format)
    home = PackedHome(packing, Split.parse(tier), Volume(folder), pinned=False)
    home.put(values)
    return home, values, layout


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tier", ["host", "nvme", "0.5 host / 0.5 nvme"])
def test_what_comes_back_is_each_matrix_rounded(
    dtype: torch.dtype, format: WeightFormat, rank: int, tier: str, tmp_path: Path
) -> None:
    home, values, layout = packed(dtype, format, rank, tier, tmp_path)
    want = rounded(values, layout, rank, format)
    assert not torch.equal(want, values)
    out = torch.full_like(values, 7)
    home.fetch(Moves(), out).wait()
    assert torch.equal(out, want)
    assert torch.equal(home.tensor.clone(), want)


@pytest.mark.parametrize(("format", "share"), [("int8", 1 / 2), ("int4", 1 / 4)])
def test_bytes_are_a_half_and_a_quarter_of_bf16(format: WeightFormat, share: float) -> None:
    layout = plan_layout([("w", torch.Size((256, 1024))), ("b", torch.Size((256,)))], 1)
    packing = plan_packing(layout, 0, torch.bfloat16, format)
    assert share < packing.nbytes / (2 * layout.numel) < 1.08 * share  # a scale of 4 bytes for 128 elements
    assert sum(stretch.end - stretch.begin for stretch in packing.stretches) == layout.shard_numel


def test_the_shard_is_copied_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    home, values, layout = packed(torch.float32, "int8", 0, "nvme", tmp_path)
    shard = home.tensor
    assert isinstance(shard, PackedShard)
    assert (shard.shape, shard.dtype) == (values.shape, values.dtype)
    for call in (
        lambda: shard[:4],
        lambda: shard.zero_(),
        lambda: shard + 1,
        lambda: shard.view(-1, 1),
    ):
        with pytest.raises(PackedWeightsError, match=r"kept as int8 .* use model.state_dict\(\)"):
            call()
    shard.detach().copy_(2 * values)
    assert torch.equal(home.tensor.clone(), rounded(2 * values, layout, 0, "int8"))
    assert torch.equal(torch.zeros_like(values).copy_(shard), shard.to(torch.float32))


def test_a_format_needs_weights_off_the_device() -> None:
    with pytest.raises(ValueError, match='params_format = "int8" is for weights off the device'):
        Tiered(params_format="int8")
    with pytest.raises(ValueError, match="int8"):
        Tiered(params="host", params_format="int3")
