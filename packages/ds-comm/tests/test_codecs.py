"""Every codec that can be found by name, by the rules for all; and what ours promise besides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_comm import Fp8, Int4, Int8, NotFiniteError, OneBit
from ds_comm.wire_rows import RowCodec, sum_rows
from ds_core.ground.codec import CastCodec
from ds_core.setup.plugins import known, look_up
from ds_core.testing.codecs import check_codec

BY_CHANCE = {"rounding": "stochastic", "seed": 3}
SETTINGS: Mapping[str, list[dict[str, Any]]] = {
    "cast": [{"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    "int8": [
        {},
        {"block": 16},
        {"block": 64, "symmetric": False},
        BY_CHANCE,
        {**BY_CHANCE, "symmetric": False},
    ],
    "int4": [
        {},
        {"block": 16},
        {"block": 64, "symmetric": False},
        BY_CHANCE,
        {**BY_CHANCE, "symmetric": False},
    ],
    "fp8": [{}, {"format": "e5m2", "block": 64}],
    "onebit": [{}, {"block": 64}, {"norm": "l2"}],
}
CASES = [(name, number) for name in known("codec") for number in range(len(SETTINGS.get(name, [{}])))]


def on_grid(src: Tensor) -> Tensor:
    """Multiples of an eighth up to 7 eighths, 7 eighths in every row: each format has them all."""
    if not src.numel():
        return src
    grid = (src.sign() * 0.875).masked_fill(src == 0, 0.875)
    return grid


def make(name: str, number: int) -> Any:
    return look_up("codec", name)(**SETTINGS.get(name, [{}])[number])


def test_ours_are_found_by_name() -> None:
    assert {"cast", "int8", "int4", "fp8", "onebit"} <= set(known("codec"))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_conformance(name: str, number: int) -> None:
    check_codec(lambda: make(name, number), exact=on_grid)


@pytest.mark.parametrize(
    "codec", [Int8(), Int8(symmetric=False), Int4(), Int4(symmetric=False), Fp8(), OneBit()]
)
def test_bytes_to_the_last(codec: RowCodec) -> None:
    bits = {"Int8": 8, "Int4": 4, "Fp8": 8, "OneBit": 1}[type(codec).__name__]
    columns = 2 if getattr(codec, "format", "")[:1] == "u" else 1
    for numel in (1, 255, 256, 257, 4096):
        scales = 1 if bits == 1 else math.ceil(numel / 256)
        words = math.ceil(math.ceil(numel * bits / 8) / 4)
        assert codec.wire_bytes(numel) == 4 * scales * columns + 4 * words


def test_the_block_is_the_cheapest() -> None:
    """[Note: the block]: bits for the scale, and for a finer step, of normal values."""
    torch.manual_seed(0)
    values = torch.randn(1 << 20).abs()
    cost = {
        b: 32 / b + math.log2(values.view(-1, b).amax(1).mean()) for b in (32, 64, 128, 256, 512, 1024, 2048)
    }
    assert min(cost, key=cost.__getitem__) == 256, cost


def test_chance_is_fair_and_differs_between_ranks_and_calls() -> None:
    src = torch.linspace(-1, 1, 1000).view(1, -1)
    codec = Int4(rounding="stochastic", seed=7)
    wire = torch.empty(1, codec.wire_bytes(1000), dtype=torch.uint8)
    total, out, seen = torch.zeros(1, 1000), torch.empty(1, 1000), []
    for _ in range(2000):
        codec.encode(src, wire)
        codec.decode(wire, out)
        total += out
        seen.append(wire.clone())
    # A step of 1/7 by chance has a variance of at most 1/4 step^2; of 2000 draws the mean strays 6 deviations
    # with a probability below 2e-9, and 2^-17 of a step is how fair chance is.
    step = 1 / 7
    assert float((total / 2000 - src).abs().max()) < 6 * step / 2 / math.sqrt(2000) + step * 2.0**-17
    assert not torch.equal(seen[0], seen[1])
    ranks = [Int4(rounding="stochastic", seed=7).at_rank(rank) for rank in (0, 1)]
    for rank, each in enumerate(ranks):
        each.encode(src, wire)
        assert torch.equal(wire, seen[0]) == (rank == 0)


@pytest.mark.parametrize("codec", [Int8(), Int4(symmetric=False), Fp8("e5m2"), OneBit(block=64)])
def test_one_bad_value_marks_every_chunk(codec: RowCodec) -> None:
    src = torch.randn(3, 700)
    wire = torch.empty(3, codec.wire_bytes(700), dtype=torch.uint8)
    codec.encode(src, wire)
    codec.refuse(wire, 700)
    src[2, 699] = torch.inf
    codec.encode(src, wire)
    for row in range(3):
        with pytest.raises(NotFiniteError, match=rf"{codec.name} was given a value that is not finite"):
            codec.decode(wire[row : row + 1], torch.empty(1, 700))
    lenient = type(codec)(**{**_arguments(codec), "nonfinite": "mark"})
    out = torch.zeros(3, 700)
    lenient.encode(src, wire)
    lenient.decode(wire, out)
    assert not bool(out[2, 699].isfinite())
    assert bool(out[:, 0].isnan().all())
    total = torch.zeros(700)
    codec.sum(wire, total)
    assert bool(total[0].isnan())


def _arguments(codec: RowCodec) -> dict[str, Any]:
    if isinstance(codec, OneBit):
        return {"block": codec.block}
    if isinstance(codec, Fp8):
        return {"format": codec.format}
    return {"symmetric": not codec.settings()["format"].startswith("u")}


@pytest.mark.parametrize(
    "codec", [Int8(), Int4(symmetric=False), Fp8(), OneBit(block=64), CastCodec(torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_rows(codec: Any, dtype: torch.dtype) -> None:
    src = torch.randn(4, 333)
    wire = torch.empty(4, codec.wire_bytes(333), dtype=torch.uint8)
    codec.encode(src, wire)
    rows = torch.empty(4, 333)
    codec.decode(wire, rows)
    total = torch.zeros(333)
    for row in rows:
        total += row
    out = torch.ones(333, dtype=dtype)
    sum_rows(codec, wire, out, scale=0.25, accumulate=True)
    assert torch.equal(out, (torch.ones(333) + total * 0.25).to(dtype))
    sum_rows(codec, wire, out, scale=0.25)
    assert torch.equal(out, (total * 0.25).to(dtype))


def test_recoding_is_summing_and_encoding() -> None:
    src = torch.randn(4, 333)
    first, second = Int8(), Int4(symmetric=False)
    wire = torch.empty(4, first.wire_bytes(333), dtype=torch.uint8)
    first.encode(src, wire)
    total = torch.empty(333)
    first.sum(wire, total)
    wanted, made = (torch.zeros(1, second.wire_bytes(333), dtype=torch.uint8) for _ in range(2))
    second.encode(total.view(1, -1), wanted)
    assert first.recode(wire, 333, second, made)
    assert torch.equal(made, wanted)
    assert not first.recode(wire, 333, Int4(block=64), made)
    assert not first.recode(wire, 333, OneBit(), made)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Int8(block=100), "multiple of 16"),
        (lambda: Int4(block=0), "multiple of 16"),
        (lambda: Int8(rounding="up"), "'nearest' or 'stochastic'"),
        (lambda: Int8(seed=-1), "seed=-1"),
        (lambda: Int8(nonfinite="ignore"), "'raise' or 'mark'"),
        (lambda: Fp8("e3m4"), "'e4m3' or 'e5m2'"),
        (lambda: OneBit(block=8), "multiple of 16"),
        (lambda: OneBit(norm="l3"), "'l1' or 'l2'"),
        (lambda: Int8().encode(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.uint8)), "wire_bytes is 12"),
        (lambda: Int8().decode(torch.zeros(2, 12), torch.zeros(2, 8)), "uint8"),
    ],
)
def test_bad_input(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()
