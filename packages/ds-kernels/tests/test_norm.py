"""What one call of the norms does not show: bits, torch's own, modules, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ds_kernels.nn as ours
from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.ops import norm
from ds_kernels.registry import load


@pytest.fixture(autouse=True)
def loaded(own_cache: None) -> None:
    load("norm", torch.device("cpu"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("center", [False, True])
def test_instruction_sets_and_threads_give_the_same_bits(
    center: bool, threads: Callable[[int], None]
) -> None:
    """Sums over columns and over rows: enough rows for several parts."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(200, 1037, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(1037, generator=generator) for _ in range(2))
    handle = open_library("norm").handle
    found = []
    for isa in Native(handle).isas():
        for count in (1, 2):
            threads(count)
            library = norm._Library(Native(handle, Options(isa)))
            y, _, mean, rstd = library.forward(x, None, weight, bias, eps=1e-5, center=center)
            how = {"center": center, "want_weight": True, "want_bias": True}
            grads = library.backward(dy, None, x, weight, mean, rstd, **how)
            found.append(torch.cat([t.reshape(-1) for t in (y, mean, rstd, *grads)]))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs(center: bool, with_residual: bool, dtype: torch.dtype) -> None:
    """Values and all gradients, the residual stream's included; bf16 within two of its steps."""
    generator = torch.Generator().manual_seed(1)
    x, residual, up, more = (torch.randn(3, 40, 96, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_(), residual.requires_grad_()] if with_residual else [x.requires_grad_()]
    theirs: nn.Module = nn.LayerNorm(96, eps=1e-5) if center else nn.RMSNorm(96, eps=1e-6)
    mine: nn.Module = ours.LayerNorm(96) if center else ours.RMSNorm(96)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=generator)
    mine.load_state_dict(theirs.state_dict())
    theirs, mine = theirs.to(dtype), mine.to(dtype)

    def grads(y: Tensor, total: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad([y, total], [*leaves, *module.parameters()], [up, more])

    total = x + residual if with_residual else x * 1
    wanted = grads(theirs(total), total, theirs)
    y, got_total = mine(x, residual) if with_residual else (mine(x), x * 1)
    assert torch.equal(got_total, total)
    for one, other in zip((y, *grads(y, got_total, mine)), (theirs(total), *wanted), strict=True):
        scale = float(other.detach().abs().max())
        tolerance = 2 * torch.finfo(dtype).eps * scale * (8 if dtype == torch.float32 else 1)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_a_gradient_of_the_residual_stream_alone() -> None:
    x, residual = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    _, total = norm.add_rms_norm(x, residual, torch.ones(8))
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 8))
    assert torch.equal(residual.grad, torch.ones(4, 8))


def test_large_and_shifted_values() -> None:
    """A mean far from zero does not eat the variance, as E[x^2] - E[x]^2 would let it."""
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(2)) + 1000
    got, want = norm.layer_norm(x), F.layer_norm(x.double(), (4096,)).float()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    assert torch.isnan(norm.rms_norm(torch.tensor([[1.0, float("nan")]]))).all()


def test_modules_say_what_they_are() -> None:
    assert repr(ours.RMSNorm(8)) == "RMSNorm(8, eps=1e-06)"
    assert repr(ours.LayerNorm(8, bias=False)) == "LayerNorm(8, eps=1e-05)"
    assert list(ours.LayerNorm(8, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("center", [False, True])
def test_it_compiles_in_one_graph(center: bool) -> None:
    module = ours.LayerNorm(16) if center else ours.RMSNorm(16)
    x, residual = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = [x, residual, *module.parameters()]
    left, right = (torch.autograd.grad([f(x, residual)[0].sin().sum()], inputs) for f in (module, compiled))
    torch.testing.assert_close(left, right)
