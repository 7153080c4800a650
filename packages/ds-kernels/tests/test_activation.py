"""What one call of the activations does not show: accuracy over the whole range, masks, bits, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.ops import activation, dropout
from ds_kernels.ops.activation import KINDS, bias_gelu, geglu, swiglu
from ds_kernels.ops.dropout import bias_dropout_add
from ds_kernels.registry import load

EXACT = {
    "silu": lambda x: x * x.sigmoid(),
    "gelu": lambda x: x * 0.5 * torch.special.erfc(-x * 0.5**0.5),
    "gelu_tanh": lambda x: x * (1.5957691216057308 * x * (1 + 0.044715 * x * x)).sigmoid(),
}


@pytest.fixture(autouse=True)
def loaded(own_cache: None) -> None:
    load("activation", torch.device("cpu"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_accurate_down_to_the_tails(kind: str) -> None:
    """Relative to the exact value: 20 units and what the exponential's argument loses, for every exponent."""
    positive = torch.logspace(-20, 2, 20001, dtype=torch.float64)
    x = torch.cat([positive, -positive, torch.linspace(-12, 12, 40001, dtype=torch.float64)]).float()
    native = activation._Library(Native(open_library("activation").handle))
    got, want = native.act(x, None, kind=kind).double(), EXACT[kind](x.double())
    inner = {"silu": x.double().abs(), "gelu": x.double().square()}.get(kind)
    if inner is None:
        inner = 6 * 1.6 * x.double().abs() * (1 + 0.044715 * x.double().square())
    allowed = 2.0**-24 * (20 + inner.clamp(max=640)) * want.abs() + 2.0**-125 * (1 + x.abs())
    off = (got - want).abs()
    print(f"{kind}: {float((off / want.abs()).where(want.abs() > 1e-30, 0).max()) * 2**24:.1f} units at most")
    assert (off <= allowed).all()
    limits = native.act(torch.tensor([float("inf"), 0.0, float("nan")]), None, kind=kind)
    assert limits[:2].tolist() == [float("inf"), 0.0]
    assert limits[2].isnan()


def test_instruction_sets_and_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, dy = (torch.randn(40, 5003, generator=generator) * 4 for _ in range(3))
    bias, seed = torch.randn(5003, generator=generator), torch.tensor([7])
    handle = open_library("activation").handle
    found = []
    for isa in Native(handle).isas():
        for count in (1, 2):
            threads(count)
            native = Native(handle, Options(isa))
            library = activation._Library(native)
            made = [library.act(x, bias, kind=kind) for kind in KINDS]
            made += [t for kind in KINDS for t in library.glu_backward(dy, x, up, kind=kind)]
            made.append(dropout._Library(native).forward(x, bias, up, seed, p=0.3))
            found.append(torch.cat(made))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_torchs(dtype: torch.dtype) -> None:
    """Values and gradients, in double from the same inputs, rounded once to their dtype."""
    generator = torch.Generator().manual_seed(1)
    x, up = (torch.randn(6, 5, 32, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    bias = torch.randn(32, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(6, 5, 32, generator=generator).to(dtype)
    half = x[..., :16], x[..., 16:]
    pairs = [
        (swiglu(x, up), F.silu(x.double()) * up.double(), dy, (x, up)),
        (swiglu(x), F.silu(half[0].double()) * half[1].double(), dy[..., :16], (x,)),
        (geglu(x, up), F.gelu(x.double()) * up.double(), dy, (x, up)),
        (bias_gelu(x, bias), F.gelu(x.double() + bias.double()), dy, (x, bias)),
        (
            bias_gelu(x, bias, kind="gelu_tanh"),
            F.gelu(x.double() + bias.double(), approximate="tanh"),
            dy,
            (x, bias),
        ),
    ]
    for mine, theirs, upstream, leaves in pairs:
        assert mine.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
        got = torch.autograd.grad(mine, leaves, upstream)
        want = torch.autograd.grad(theirs, leaves, upstream.double())
        for one, other in zip(got, want, strict=True):
            tolerance = (30 if one.dim() == 1 else 4) * torch.finfo(dtype).eps  # a bias's: of 30 rounded rows
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_packed_tensor_is_read_where_it_lies() -> None:
    """Slices of a wider tensor too: rows with a stride."""
    wide = torch.randn(4, 7, 40)
    assert torch.equal(swiglu(wide[..., :24]), swiglu(wide[..., :12].clone(), wide[..., 12:24].clone()))


def test_the_mask_is_a_fair_coin_and_the_backward_has_the_same_one() -> None:
    n, p = 1 << 20, 0.3
    x = torch.ones(n // 64, 64, requires_grad=True)
    y = bias_dropout_add(x, torch.zeros_like(x), p=p, seed=torch.tensor([11]))
    kept = y.detach() != 0
    # 5 standard deviations of the count, and of pairs at short distances and at a row's
    assert abs(int(kept.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    centred = kept.double().reshape(-1) - (1 - p)
    for apart in (1, 2, 3, 4, 64, 1024):
        together = float((centred[apart:] * centred[:-apart]).mean()) / (p * (1 - p))
        assert abs(together) < 5 / n**0.5
    assert torch.equal(y.detach()[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())


def test_seeds() -> None:
    x = torch.ones(8, 64)
    zeros = torch.zeros_like(x)

    def run(seed: Tensor | None = None) -> Tensor:
        return bias_dropout_add(x, zeros, p=0.5, seed=seed)

    torch.manual_seed(3)
    one, two = run(), run()
    torch.manual_seed(3)
    assert torch.equal(one, run())
    assert not torch.equal(one, two)
    assert torch.equal(run(torch.tensor([5])), run(torch.tensor([5])))
    assert not torch.equal(run(torch.tensor([5])), run(torch.tensor([5 + 2**32])))
    assert torch.equal(bias_dropout_add(x, zeros, p=0.5, training=False), x)
    nan = torch.full((8, 64), float("nan"))
    assert torch.equal(bias_dropout_add(nan, x, p=1.0), x)  # what is dropped is gone, not multiplied by 0


def test_they_compile_in_one_graph() -> None:
    x, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    bias, seed = torch.randn(8, requires_grad=True), torch.tensor([1])

    def run(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return bias_dropout_add(bias_gelu(swiglu(x, up), bias), x, bias, p=0.5, seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = (x, up, bias)
    left, right = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (run, compiled))
    torch.testing.assert_close(left, right)
