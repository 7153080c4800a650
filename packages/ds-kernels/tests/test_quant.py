"""What conformance cannot see of quantisation: error bounds, statistics, and what bits may not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_kernels import load
from ds_kernels.ops.quant import (
    Blocks,
    FormatName,
    allocate_blocks,
    dequantize_blocks,
    quantize_blocks,
)
from ds_kernels.ops.quant_formats import FORMATS

INTEGERS: tuple[FormatName, ...] = ("int8", "uint8", "int4", "uint4")
EVERY: tuple[FormatName, ...] = (*INTEGERS, "e4m3", "e5m2", "e3m2", "e4m7")


@pytest.fixture(scope="module", autouse=True)
def native(own_cache: None) -> None:
    load("quant", torch.device("cpu"), strict=True)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def per_element(blocks: Blocks, values: Tensor) -> Tensor:
    return values.repeat_interleave(blocks.block, -1)[..., : blocks.shape[-1]].double()


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-37, 1e-42, 1e36])
def test_the_error_is_bounded_as_the_docstring_says(format: FormatName, scale: float) -> None:
    x = normal(7, 1000, scale=scale)
    x[3] += 100 * scale  # far from zero: what asymmetric formats are for
    blocks = quantize_blocks(x, format=format, block=64)
    error = (dequantize_blocks(blocks).double() - x.double()).abs()
    steps, form = per_element(blocks, blocks.scales), FORMATS[format]
    size = x.view(7, -1, 1).abs().double().squeeze(-1)
    if form.exponent:
        bias = 2 ** (form.exponent - 1) - 1
        subnormal = steps * 2.0 ** (1 - bias - form.mantissa) / 2
        bound = torch.maximum(size * 2.0 ** -(form.mantissa + 1), subnormal) + size * 2.0**-22
    else:
        padded = torch.nn.functional.pad(size, (0, -1000 % 64)).view(7, -1, 64)
        bound = steps / 2 + per_element(blocks, padded.amax(-1)) * 2.0**-21
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("format", INTEGERS)
def test_stochastic_rounding_stays_within_a_step_and_on_the_grid(format: FormatName) -> None:
    x = normal(5000)
    blocks = quantize_blocks(x, format=format, rounding="stochastic", seed=3)
    error = (dequantize_blocks(blocks).double() - x.double()).abs()
    assert (error <= per_element(blocks, blocks.scales) * (1 + 2.0**-15)).all()
    again = quantize_blocks(dequantize_blocks(blocks), format=format, rounding="stochastic", seed=4)
    assert torch.allclose(dequantize_blocks(again), dequantize_blocks(blocks), rtol=0, atol=1e-6)


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 4000 roundings is within 5 standard deviations of every one of 64 values.

    A rounding of a value t codes above the grid has variance t * (1 - t) <= 1/4 of a step squared; with the
    normal approximation all 64 stay inside 5 deviations with probability 1 - 64 * 5.7e-7 > 0.9999. The seeds
    are fixed: the test either always passes or never does. 2^-17 of a step is the resolution of the draw.
    """
    x = normal(64, seed=7)
    rounds = 4000
    mean, scale = torch.zeros(64, dtype=torch.float64), 0.0
    for seed in range(rounds):
        blocks = quantize_blocks(x, format="int4", block=64, rounding="stochastic", seed=seed)
        mean += dequantize_blocks(blocks).double()
        scale = float(blocks.scales)
    fraction = (x.double() / scale) % 1.0
    deviation = (fraction * (1 - fraction)).sqrt() * scale / math.sqrt(rounds)
    assert ((mean / rounds - x.double()).abs() <= 5 * deviation + scale * (2.0**-17 + 2.0**-20)).all()


def test_draws_of_neighbours_blocks_and_seeds_are_independent() -> None:
    """Correlation of half a million draws with what should not know of them: below 5 / sqrt(n)."""
    n = 1 << 19
    x = torch.full((n,), 0.5)
    x[::1024] = 7.0  # scale 1: every other value is halfway between two codes

    def draws(seed: int) -> Tensor:
        made = quantize_blocks(x, format="int4", block=1024, rounding="stochastic", seed=seed)
        return (dequantize_blocks(made).view(-1, 1024)[:, 1:] - 0.5) * 2

    one, other = draws(1), draws(2)
    most = 5 / math.sqrt(n - 1024)
    assert abs(one.mean()) < most
    assert abs((one * other).mean()) < most
    assert abs((one[1:] * one[:-1]).mean()) < most
    for lag in (1, 2, 8, 16, 32, 48, 64, 128):  # halves of one hash are 16 apart, their multiples 32
        assert abs((one[:, lag:] * one[:, :-lag]).mean()) < 5 / math.sqrt(n * (1 - lag / 1024) - 1024), lag


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.013])
def test_draws_of_a_group_are_independent_two_by_two(fraction: float) -> None:
    """All 2016 pairs of 64 elements, of which some share a hash: correlations below 5 / sqrt(n).

    Rounded up is what exceeds a fraction: pairs of events of many sizes, not of signs alone. A pair stays
    within 5 deviations with probability 1 - 5.7e-7 under independence. And the number that is rounded up in a
    group has the variance of 63 free draws, as far as n groups show it: to sqrt((2 + excess kurtosis) / n).
    """
    n = 1 << 15
    x = torch.full((n, 65), 0.0)
    x[:, 1:] = fraction
    x[:, 0] = 7.0  # scale 1; the element itself is always exact
    blocks = quantize_blocks(x[:, :64].contiguous(), format="int4", block=64, rounding="stochastic", seed=5)
    up = dequantize_blocks(blocks)[:, 1:].double()
    assert set(up.unique().tolist()) == {0.0, 1.0}
    errors = up - fraction
    together = torch.corrcoef(errors.T).fill_diagonal_(0)
    assert together.abs().max() < 5 / math.sqrt(n)
    each = fraction * (1 - fraction)
    variance, excess = errors.sum(1).square().mean() / (63 * each), (1 - 6 * each) / (63 * each)
    assert abs(variance - 1) < 5 * math.sqrt((2 + excess) / n)


def test_bits_do_not_depend_on_threads_or_on_how_a_tensor_is_cut() -> None:
    x = normal(1 << 18)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize_blocks(x, rounding="stochastic", seed=9)
        torch.set_num_threads(3)
        together = quantize_blocks(x, rounding="stochastic", seed=9)
    finally:
        torch.set_num_threads(threads)
    cut = 100 * 256
    first = quantize_blocks(x[:cut], rounding="stochastic", seed=9)
    rest = quantize_blocks(x[cut:], rounding="stochastic", seed=9, first_block=100)
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.codes, torch.cat([first.codes, rest.codes]))
    assert torch.equal(alone.scales, torch.cat([first.scales, rest.scales]))


@pytest.mark.parametrize("format", EVERY)
def test_what_is_not_finite_spoils_its_own_block_only(format: FormatName) -> None:
    x = normal(6, 64)
    x[1, 5], x[2, 0], x[3, 9] = float("nan"), float("inf"), -float("inf")
    x[4, :2] = torch.tensor([3e38, -3e38])
    values = dequantize_blocks(quantize_blocks(x.view(-1), format=format, block=64)).view(6, 64)
    assert values[1:5].isnan().all()
    assert values[[0, 5]].isfinite().all()
    zero = dequantize_blocks(quantize_blocks(torch.zeros(100), format=format, block=64))
    assert torch.equal(zero, torch.zeros(100))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_fp8_codes_are_those_of_torch(format: FormatName) -> None:
    x = normal(4096).sort().values * torch.logspace(-6, 0, 4096)
    blocks = quantize_blocks(x, format=format, block=4096)
    inverse = 1.0 / blocks.scales
    assert blocks.codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    theirs = (x * inverse).to(blocks.codes.dtype)
    assert torch.equal(blocks.codes.view(torch.uint8), theirs.view(torch.uint8))
    every = torch.arange(256, dtype=torch.uint8)
    values = dequantize_blocks(
        Blocks(every, torch.ones(1), None, torch.Size([256]), torch.float32, format, 256)
    )
    wanted = every.view(blocks.codes.dtype).float()
    assert torch.equal(values.nan_to_num(9e9), wanted.nan_to_num(9e9, 9e9, 9e9))


def test_codes_are_packed_lowest_bits_first() -> None:
    assert quantize_blocks(torch.tensor([1.0, -7.0, 3.0]), format="int4", block=16).codes.tolist() == [
        0x91,
        3,
    ]
    six = quantize_blocks(torch.tensor([28.0, -28.0, 1.0, 0.0625]), format="e3m2", block=16).codes
    word = int.from_bytes(bytes(six.tolist()), "little")
    assert [word >> (6 * i) & 63 for i in range(4)] == [0b011111, 0b111111, 0b001100, 0b000001]


def test_columns_of_one_wire_buffer_can_be_written() -> None:
    """Codes and scales of each row next to each other, as a collective sends them."""
    x = normal(3, 1000)
    plain = quantize_blocks(x, format="int4")
    wire = torch.zeros(3, 500 + 4 * 4, dtype=torch.uint8)
    out = Blocks(wire[:, :500], wire[:, 500:].view(torch.float32), None, x.shape, x.dtype, "int4", 256)
    quantize_blocks(x, out=out)
    assert torch.equal(wire[:, :500], plain.codes)
    assert torch.equal(dequantize_blocks(out), dequantize_blocks(plain))


def test_mistakes_are_named() -> None:
    x = torch.zeros(64)
    for wrong, words in (
        ({"format": "int3"}, "format='int3' is not known"),
        ({"block": 24}, "block=24 is not allowed: it must be a positive multiple of 16"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"format": "e4m3", "rounding": "stochastic"}, "stochastic=True needs an integer format"),
        ({"out": allocate_blocks((65,))}, r"codes is shape \(65,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_blocks(x, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is shape"):
        quantize_blocks(torch.tensor(1.0))
    with pytest.raises(ValueError, match="needs `out` to add to"):
        dequantize_blocks(quantize_blocks(x), accumulate=True)
