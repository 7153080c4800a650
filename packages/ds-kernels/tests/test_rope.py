"""What one call of the rotary embedding does not show: layouts, memory, what makes it rotary, tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_kernels.ops.rope import rotary, rotary_, rotary_tables
from ds_kernels.registry import load


@pytest.fixture(autouse=True)
def loaded(own_cache: None) -> None:
    load("rope", torch.device("cpu"))


def llama(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [batch, heads, T, D] as Llama's modelling code writes it, in double."""
    c, s = (torch.cat([t[positions], t[positions]], -1)[:, None].double() for t in (cos, sin))
    a, b = x.double().chunk(2, -1)
    return x.double() * c + torch.cat([-b, a], -1) * s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_llamas(dtype: torch.dtype) -> None:
    """Read and written through a transposed view, without a copy, gradient included."""
    x = torch.randn(2, 3, 7, 16).to(dtype).requires_grad_()
    cos, sin = rotary_tables(40, 16)
    positions = torch.randint(0, 40, (2, 7))
    got = rotary(x.transpose(1, 2), cos, sin, positions)
    assert got.stride() == x.transpose(1, 2).stride()
    want = llama(x, cos, sin, positions).transpose(1, 2)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    up = torch.randn(2, 7, 3, 16).to(dtype)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, u) for y, u in ((got, up), (want, up.double())))
    torch.testing.assert_close(mine, theirs, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_only(interleaved: bool) -> None:
    """The point of it; and the length of a pair stays."""
    cos, sin = rotary_tables(200, 8)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i: int, j: int) -> Tensor:
        one, other = (
            rotary(t, cos, sin, torch.tensor([p]), interleaved=interleaved) for t, p in ((q, i), (k, j))
        )
        return (one * other).sum()

    torch.testing.assert_close(score(3, 10), score(150, 157), rtol=1e-4, atol=1e-4)
    turned = rotary(q, cos, sin, torch.tensor([99]), interleaved=interleaved)
    torch.testing.assert_close(turned.norm(), q.norm())


def test_in_place_with_a_gradient() -> None:
    cos, sin = rotary_tables(9, 6)
    x = torch.randn(2, 9, 2, 10, requires_grad=True)
    copy = x * 1
    address = copy.data_ptr()
    turned = rotary_(copy, cos, sin)
    assert turned.data_ptr() == address
    assert torch.equal(turned, rotary(x, cos, sin))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    (one,) = torch.autograd.grad(turned.square().sum(), x, retain_graph=True)
    (other,) = torch.autograd.grad(rotary(x, cos, sin).square().sum(), x)
    assert torch.equal(one, other)


def test_the_inverse_undoes_it() -> None:
    cos, sin = rotary_tables(50, 32)
    x = torch.randn(3, 50, 4, 32)
    back = torch.ops.ds.rope(rotary(x, cos, sin), cos, sin, torch.arange(50), interleaved=False, inverse=True)
    torch.testing.assert_close(back, x)


def test_positions_outside_are_refused() -> None:
    cos, sin = rotary_tables(4, 4)
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match=r"rope: positions=4 is not allowed: it must be in \[0, 4\)"):
        rotary(x, cos, sin)
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        rotary(x[0], cos, sin)
    with pytest.raises(ValueError, match="dim=3 is not allowed: it must be even"):
        rotary_tables(4, 3)


def test_far_positions_keep_their_angle() -> None:
    """Tables in fp32 from float64: a million tokens on, the angle is off by rounding of cos and sin only."""
    cos, sin = rotary_tables(1_000_001, 2)
    angle = torch.tensor(1_000_000.0, dtype=torch.float64)
    assert abs(float(cos[-1, 0]) - float(angle.cos())) < 1e-7
    assert abs(float(sin[-1, 0]) - float(angle.sin())) < 1e-7


def test_it_compiles_in_one_graph() -> None:
    cos, sin = rotary_tables(8, 4)
    x = torch.randn(2, 8, 2, 4, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return rotary(x, cos, sin).sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    left, right = (torch.autograd.grad(f(x), x) for f in (run, compiled))
    torch.testing.assert_close(left, right)
