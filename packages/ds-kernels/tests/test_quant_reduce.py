"""Sums of quantised chunks against the same done step by step, and what they may not depend on."""

from __future__ import annotations

import pytest
import torch

from ds_kernels import load
from ds_kernels.ops.quant import FormatName, allocate_blocks, dequantize_blocks, quantize_blocks
from ds_kernels.ops.quant_reduce import requantize_blocks, sum_blocks


@pytest.fixture(scope="module", autouse=True)
def native(own_cache: None) -> None:
    load("quant", torch.device("cpu"), strict=True)


def chunks(ranks: int, numel: int) -> torch.Tensor:
    return torch.randn(ranks, numel, generator=torch.Generator().manual_seed(ranks))


@pytest.mark.parametrize("format", ["int8", "uint4", "e4m3", "e3m2"])
def test_a_sum_in_one_pass_is_the_sum_step_by_step(format: FormatName) -> None:
    received = quantize_blocks(chunks(5, 3000), format=format, block=128)
    total = torch.zeros(3000)
    for row in dequantize_blocks(received):
        total += row
    assert torch.equal(sum_blocks(received), total)
    assert torch.equal(sum_blocks(received, factor=0.2), total * torch.tensor(0.2))
    assert torch.equal(sum_blocks(received, dtype=torch.bfloat16), total.bfloat16())
    again = requantize_blocks(received, format="int4", rounding="stochastic", seed=5, first_block=2)
    wanted = quantize_blocks(total, format="int4", block=128, rounding="stochastic", seed=5, first_block=2)
    assert torch.equal(again.codes, wanted.codes)
    assert torch.equal(again.scales, wanted.scales)


def test_two_hops_lose_no_more_than_the_sum_of_their_bounds() -> None:
    """k roundings of half a scale each, and one of the sum; fp32 sums add k units of 2^-24."""
    x = chunks(8, 4096)
    received = quantize_blocks(x, block=256)
    sent = requantize_blocks(received)
    error = (dequantize_blocks(sent).double() - x.double().sum(0)).abs().view(-1, 256)
    sizes = x.abs().view(8, -1, 256).amax(2).sum(0)
    bound = received.scales.sum(0) / 2 + sent.scales / 2 + sizes * (2.0**-21 + 8 * 2.0**-24)
    assert (error <= bound[:, None].double()).all()


def test_bits_do_not_depend_on_threads_and_blocks_may_be_a_whole_row() -> None:
    received = quantize_blocks(chunks(3, 100_000), format="int4", block=100_000)
    before, threads = sum_blocks(received), torch.get_num_threads()
    small = quantize_blocks(chunks(3, 100_000), format="int4")
    sent = requantize_blocks(small)
    try:
        torch.set_num_threads(3)
        assert torch.equal(sum_blocks(received), before)
        assert torch.equal(requantize_blocks(small).codes, sent.codes)
    finally:
        torch.set_num_threads(threads)


def test_a_nan_of_one_rank_spoils_its_block_of_the_sum() -> None:
    x = chunks(2, 128)
    x[1, 3] = float("nan")
    sent = requantize_blocks(quantize_blocks(x, block=64))
    values = dequantize_blocks(sent)
    assert values[:64].isnan().all()
    assert values[64:].isfinite().all()


def test_no_chunks_sum_to_nothing_and_mistakes_are_named() -> None:
    empty = allocate_blocks((0, 100))
    assert torch.equal(sum_blocks(empty), torch.zeros(100))
    one = quantize_blocks(chunks(1, 100))
    with pytest.raises(ValueError, match="factor=nan is not allowed: it must be finite"):
        sum_blocks(one, factor=float("nan"))
    with pytest.raises(ValueError, match="out has blocks of 64, received of 256"):
        requantize_blocks(one, out=allocate_blocks((100,), block=64))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        sum_blocks(quantize_blocks(chunks(1, 100)[0]), out=torch.empty(100))
