"""Packed weights, QuantLinear, routes by size, and bits that depend on neither threads nor neighbours."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ds_kernels import PackedLinear, QuantLinear, dequantize_linear, linear_bf16, pack_linear, quant_linear
from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.ops.linear import bound_bf16, make_bound, make_reference, reference_bf16
from ds_kernels.ops.linear_native import Routes, make_native, make_native_bf16
from ds_kernels.packed import BLOCKS, LARGEST, Bits, _from_bytes, _to_bytes, fp6_values
from ds_kernels.registry import load

CPU = torch.device("cpu")
ALL: list[tuple[Bits, bool]] = [(8, True), (6, True), (4, True), (4, False)]


def weight(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def far(mine: Tensor, wanted: Tensor, bound: Tensor) -> Tensor:
    return (mine.double() - wanted.double()).abs() > bound


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("columns", [1, 100, 256, 300])
def test_bytes_hold_every_code(bits: Bits, columns: int) -> None:
    codes = torch.arange(3 * columns).view(3, columns) * 7 % 2**bits
    packed = _to_bytes(codes, bits)
    assert packed.shape[1] == -(-columns // BLOCKS[bits]) * BLOCKS[bits] * bits // 8
    assert torch.equal(_from_bytes(packed, bits)[:, :columns], codes.to(torch.int32))


@pytest.mark.parametrize(("bits", "symmetric"), ALL)
@pytest.mark.parametrize("group", [0, 32, 96])
def test_packing_is_within_half_a_step(bits: Bits, symmetric: bool, group: int) -> None:
    w = weight(9, 200) + 0.3
    packed = pack_linear(w, bits, group=group, symmetric=symmetric)
    scales = packed.scales.repeat_interleave(group or 200, 1)[:, :200]
    if bits == 6:  # half the distance of neighbours: an eighth of the value, at least half of 1/16
        step = torch.maximum(w.abs() / 8, scales / 32)
    elif symmetric:
        step = scales / 2
    else:  # the zero point is rounded too
        step = scales
    assert ((dequantize_linear(packed) - w).abs() <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_what_a_code_can_say_comes_back(bits: Bits) -> None:
    values = fp6_values() if bits == 6 else torch.arange(-LARGEST[bits], LARGEST[bits] + 1)
    w = torch.stack([values, values.flip(0)]) * 0.25
    packed = pack_linear(w, bits, group=0)
    assert torch.equal(dequantize_linear(packed), w)
    again = pack_linear(dequantize_linear(packed), bits, group=0)
    assert torch.equal(again.codes, packed.codes)


def test_fp6_ties_go_to_even() -> None:
    w = torch.tensor([[28.0, 26.0, 22.0, 1.125, 1.375, -1.125, 0.03125, 0.09375]])
    assert dequantize_linear(pack_linear(w, 6)).tolist() == [[28.0, 24.0, 24.0, 1.0, 1.5, -1.0, 0.0, 0.125]]


def test_zero_rows_and_empty_batches() -> None:
    packed = pack_linear(torch.zeros(4, 64), 4)
    assert torch.equal(quant_linear(torch.randn(3, 64), packed), torch.zeros(3, 4))
    assert quant_linear(torch.randn(2, 0, 64), packed).shape == (2, 0, 4)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("without_bf16", [False, True])
def test_many_rows_and_a_long_k(bits: Bits, without_bf16: bool) -> None:
    """Past every block: eight channels, three rows of x, 4096 bytes of k, and 32 channels at a time."""
    native = Native(open_library("linear").handle, Options())
    group = 96 if bits == 4 else 0
    packed = pack_linear(weight(41, 2336), bits, group=group)
    for batch in (5, 37):
        x = weight(batch, 2336, 1).bfloat16()
        args = (x, packed.codes, packed.scales, packed.zeros, None, group, 2336)
        wanted = make_reference(bits)(*args)
        mine = make_native(native, bits, make_reference(bits), without_bf16=without_bf16)(*args)
        assert not far(mine, wanted, make_bound(bits)(args, {}, [wanted])[0]).any()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_dense_route_rounds_the_weight_once(bits: Bits) -> None:
    native = Native(open_library("linear").handle, Options())
    packed = pack_linear(weight(24, 160), bits, group=32)  # groups: the bound has the rounding of the weight
    x = weight(6, 160, 1).bfloat16()
    args = (x, packed.codes, packed.scales, packed.zeros, None, 32, 160)
    wanted = make_reference(bits)(*args)
    mine = make_native(native, bits, make_reference(bits), Routes(dense=6, plain=0))(*args)
    assert not far(mine, wanted, make_bound(bits)(args, {}, [wanted])[0]).any()
    assert torch.equal(mine, nn.functional.linear(x, dequantize_linear(packed, torch.bfloat16)))


def test_bf16_routes_agree() -> None:
    native = Native(open_library("linear").handle, Options())
    x, w = weight(4, 96, 1).bfloat16(), weight(11, 96).bfloat16()
    wanted = reference_bf16(x, w)
    for plain in (0, 100):
        mine = make_native_bf16(native, reference_bf16, Routes(dense=0, plain=plain))(x, w)
        assert not far(mine, wanted, bound_bf16((x, w, None), {}, [wanted])[0]).any()


@pytest.mark.parametrize(("bits", "symmetric"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_depend_on_neither_threads_nor_neighbours(
    bits: Bits, symmetric: bool, dtype: torch.dtype, threads: None
) -> None:
    load("linear", CPU)
    packed = pack_linear(weight(70, 320), bits, group=32, symmetric=symmetric)
    x = weight(9, 320, 1).to(dtype)
    torch.set_num_threads(1)
    one = quant_linear(x, packed)
    torch.set_num_threads(3)
    assert torch.equal(quant_linear(x, packed), one)
    assert torch.equal(quant_linear(x[2:7], packed), one[2:7])
    rows = PackedLinear(
        bits, 320, 32, packed.codes[3:20], packed.scales[3:20],
        None if packed.zeros is None else packed.zeros[3:20],
    )  # fmt: skip
    assert torch.equal(quant_linear(x, rows), one[:, 3:20])


def test_special_values_pass_through() -> None:
    packed = pack_linear(torch.ones(8, 64), 8)
    w = torch.ones(8, 64).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(3, 64, dtype=dtype)
        x[0, 5], x[1, 7] = float("nan"), float("inf")
        outputs = [quant_linear(x, packed)]
        if dtype == torch.bfloat16:
            outputs.append(linear_bf16(x, w))
        for y in outputs:
            assert y[0].isnan().all()
            assert (y[1] == float("inf")).all()
            assert (y[2] == 64).all()


def test_module_round_trip() -> None:
    for bits, symmetric in ALL:
        linear = nn.Linear(200, 12)
        layer = QuantLinear.from_linear(linear, bits, 64, symmetric)
        x = torch.randn(2, 3, 200)
        packed = pack_linear(linear.weight, bits, group=64, symmetric=symmetric)
        assert torch.equal(layer.dequantize(), dequantize_linear(packed))
        assert torch.equal(layer(x), quant_linear(x, packed, linear.bias.detach()))
        twin = QuantLinear(200, 12, bits, 64, symmetric)
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
        assert all(type(value) is Tensor for value in layer.state_dict().values())
        low = copy.deepcopy(layer).bfloat16()
        assert low.scales.dtype == torch.float32
        assert torch.equal(low.scales, layer.scales)
        assert low(x.bfloat16()).dtype == torch.bfloat16
    shown = "in_features=200, out_features=12, bits=4, group=64, symmetric=False, bias=True"
    assert shown in repr(layer)
    assert "bias=False" in repr(QuantLinear(8, 8, bias=False, device="meta"))


def test_lora_over_a_quantised_base() -> None:
    base = QuantLinear.from_linear(nn.Linear(64, 32), 4)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(5, 64, requires_grad=True)
    (base(x) + up(down(x))).square().sum().backward()
    y = (base(x) + up(down(x))).detach()
    assert x.grad is not None
    wanted = 2 * y @ base.dequantize() + 2 * y @ up.weight @ down.weight
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-4)
    assert down.weight.grad is not None
    assert not any(p.requires_grad for p in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_compiled_graphs_hold_the_op() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 16), 8)
    x = torch.randn(2, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_bad_input() -> None:
    w = torch.randn(4, 64)
    for bad, words in (
        ((w, 5), "bits=5"),
        ((w[0], 8), "weight is shape"),
        ((w.to(torch.int32), 8), "floating-point"),
        ((w / 0, 8), "infinite or NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            pack_linear(*bad)
    with pytest.raises(ValueError, match="group=48"):
        pack_linear(w, group=48)
    with pytest.raises(ValueError, match="symmetric=False is for 4 bits"):
        pack_linear(w, 8, symmetric=False)
    with pytest.raises(ValueError, match="symmetric=False is for 4 bits"):
        QuantLinear(4, 4, 6, symmetric=False)
    with pytest.raises(ValueError, match=r"x is shape \(3, 65\).*columns=64"):
        quant_linear(torch.randn(3, 65), pack_linear(w, 4))
    with pytest.raises(ValueError, match="linear_bf16: weight is"):
        linear_bf16(torch.randn(2, 64).bfloat16(), w)


def test_a_layer_made_on_meta_comes_to_life() -> None:
    made = QuantLinear(64, 16, 4, device="meta").to_empty(device="cpu")
    made.load_state_dict(QuantLinear.from_linear(nn.Linear(64, 16), 4).state_dict())
    assert made(torch.ones(2, 64)).shape == (2, 16)
    assert made.scales.dtype == torch.float32
