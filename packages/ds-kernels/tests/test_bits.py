"""What conformance cannot see of signs and sums: error feedback over steps, threads, cuts, odd addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_kernels import load
from ds_kernels.ops.bits import Signs, allocate_signs, pack_signs_, unpack_signs
from ds_kernels.ops.sums import sum_into_


@pytest.fixture(scope="module", autouse=True)
def native(own_cache: None) -> None:
    load("bits", torch.device("cpu"), strict=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("block", [256, None])
def test_signs_and_scales_are_those_of_the_paper(norm: str, block: int | None) -> None:
    x, error = normal(2, 3000), normal(2, 3000, seed=1)
    total = x + error
    made = pack_signs_(x, error, block=block, norm=norm)  # type: ignore[arg-type]
    parts = total.split(block or 3000, dim=1)
    power = 1 if norm == "l1" else 2
    wanted = [(part.double().abs() ** power).mean(1) ** (1 / power) for part in parts]
    assert torch.allclose(made.scales.double(), torch.stack(wanted, 1), rtol=2.0**-23, atol=0)
    steps = made.scales.repeat_interleave(made.block, 1)[:, :3000]
    sent = torch.stack([unpack_signs(Signs(*row, torch.Size([3000]), x.dtype, made.block))
                        for row in zip(made.signs, made.scales, strict=True)])  # fmt: skip
    assert torch.equal(sent, torch.where(total < 0, -steps, steps))
    assert torch.equal(error, total - sent)


def test_what_is_sent_adds_up_to_what_was_given_less_the_last_error() -> None:
    """Each step rounds value + error and error - sent once: at most 2^-24 of 2 (|error| + |value|) a step."""
    error, given, sent = torch.zeros(1000), torch.zeros(1000).double(), torch.zeros(1000).double()
    rounded = torch.zeros(1000).double()
    for step in range(100):
        value = normal(1000, seed=step) + 0.1
        before = error.abs().double() + value.abs().double()
        made = pack_signs_(value, error)
        given += value
        sent += unpack_signs(made)
        rounded += (before + error.abs().double()) * 2.0**-23
    assert ((sent + error.double() - given).abs() <= rounded).all()
    assert (given - sent).abs().max() < 30  # without feedback the loss grows with every step: 100 * 0.8


def test_ranks_add_up_in_one_call() -> None:
    made = pack_signs_(normal(4, 5000), block=64)
    rows = [unpack_signs(Signs(s, c, torch.Size([5000]), torch.float32, 64))
            for s, c in zip(made.signs, made.scales, strict=True)]  # fmt: skip
    total = rows[0] + rows[1] + rows[2] + rows[3]
    assert torch.equal(unpack_signs(made, factor=0.25), total * 0.25)
    out = torch.ones(5000, dtype=torch.bfloat16)
    assert torch.equal(unpack_signs(made, out=out, accumulate=True), (total + 1).bfloat16())


def test_bits_do_not_depend_on_threads() -> None:
    x, threads = normal(3, 100_000), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            error = normal(3, 100_000, seed=4)
            results.append((pack_signs_(x, error), error))
    finally:
        torch.set_num_threads(threads)
    (one, first), (other, second) = results
    assert torch.equal(one.signs, other.signs)
    assert torch.equal(one.scales, other.scales)
    assert torch.equal(first, second)


def test_special_values() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 0.0, 1.0, -8.0])
    made = pack_signs_(x)
    assert made.signs.tolist() == [0b11010111, 0]
    assert made.scales.tolist() == [float(x.abs().sum() / 9)]
    x = normal(64)
    x[3] = float("nan")
    values = unpack_signs(pack_signs_(x, block=32))
    assert values[:32].isnan().all()
    assert values[32:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_at_any_address_and_into_a_source(dtype: torch.dtype) -> None:
    """Views of a byte buffer at odd offsets, as flat shared memory gives them."""
    n, size = 20_001, torch.empty(0, dtype=dtype).element_size()
    memory = bytearray(3 * (n * size + 3))
    views = [torch.frombuffer(memory, dtype=dtype, count=n, offset=1 + i * (n * size + 2)) for i in range(3)]
    for i, view in enumerate(views):
        view.copy_(normal(n, seed=i))
    total = views[0].float() + views[1].float() + views[2].float()
    out = torch.empty(n, dtype=torch.bfloat16)
    assert torch.equal(sum_into_(out, views), total.bfloat16())
    assert torch.equal(sum_into_(views[1], views), total.to(dtype))


def test_one_source_is_a_cast_and_none_is_zero() -> None:
    x = normal(100)
    assert torch.equal(sum_into_(torch.empty(10, 10, dtype=torch.float16), [x]), x.half().view(10, 10))
    assert torch.equal(sum_into_(torch.ones(3), []), torch.zeros(3))


def test_mistakes_are_named() -> None:
    x = torch.zeros(64)
    with pytest.raises(ValueError, match="block=24 is not allowed: it must be a positive multiple of 16"):
        pack_signs_(x, block=24)
    with pytest.raises(ValueError, match="norm='l3'"):
        pack_signs_(x, norm="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="error is shape"):
        pack_signs_(x, torch.zeros(63))
    with pytest.raises(ValueError, match="signs is shape"):
        pack_signs_(x, out=allocate_signs((65,)))
    with pytest.raises(ValueError, match="needs `out` to add to"):
        unpack_signs(pack_signs_(x), accumulate=True)
    with pytest.raises(ValueError, match=r"sources\[0\] and out share memory"):
        sum_into_(x[1:], [x[:-1]])
    with pytest.raises(ValueError, match=r"sources\[1\] is shape"):
        sum_into_(x, [x, x.bfloat16()])
