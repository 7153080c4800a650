"""What one call of the softmax does not show: memory of masks, bits, special rows, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.ops import softmax as op
from ds_kernels.ops.softmax import softmax
from ds_kernels.registry import load


@pytest.fixture(autouse=True)
def loaded(own_cache: None) -> None:
    load("softmax", torch.device("cpu"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_instruction_sets_and_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 3, 20, 1037, generator=generator) * 4 for _ in range(2))
    mask = torch.randn(20, 1037, generator=generator) > 0
    handle = open_library("softmax").handle
    found = []
    for isa in Native(handle).isas():
        for count in (1, 2):
            threads(count)
            library = op._Library(Native(handle, Options(isa)))
            y = library.forward(x, mask, scale=0.3, causal=True)
            found.append(torch.cat([y, library.backward(dy, y, scale=0.3)]))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 9, 9).to(dtype).requires_grad_()
    added = torch.randn(4, 1, 9)
    late = torch.ones(9, 9, dtype=torch.bool).triu(1)
    want = (x.double() * 0.2 + added.double()).masked_fill(late, -torch.inf).softmax(-1)
    got = softmax(x, added, scale=0.2, causal=True)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    up = torch.randn(2, 4, 9, 9).to(dtype)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, u) for y, u in ((got, up), (want, up.double())))
    torch.testing.assert_close(mine, theirs, rtol=2 * tolerance, atol=2 * tolerance)


def test_a_repeated_mask_is_not_copied() -> None:
    x = torch.zeros(2, 8, 16, 16)
    rows = op.mask_rows(torch.ones(2, 1, 1, 16, dtype=torch.bool), x)
    assert rows.shape == x.shape
    assert rows.stride() == (16, 0, 0, 1)
    assert op.mask_rows(torch.zeros(16, 16).expand(2, 8, 16, 16), x).stride() == (0, 0, 16, 1)


def test_rows_in_which_nothing_stays_are_zeros() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    mask = torch.tensor([[False], [True], [True]])
    y = softmax(x, mask)
    assert torch.equal(y[0].detach(), torch.zeros(5))
    torch.testing.assert_close(y[1:], x[1:].softmax(-1))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad[0], torch.zeros(5))
    # more queries than keys: the first see none
    assert torch.equal(softmax(torch.zeros(3, 2), causal=True), torch.tensor([[0, 0], [1, 0], [0.5, 0.5]]))


def test_special_values() -> None:
    x = torch.tensor([[1e30, -1e30, 0.0], [float("-inf"), 0.0, 0.0], [float("nan"), 0.0, 0.0]])
    y = softmax(x)
    assert y[:2].tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    assert y[2].isnan().all()
    torch.testing.assert_close(softmax(torch.full((1, 3), -3e38)), torch.full((1, 3), 1 / 3))


def test_wrong_masks_are_refused() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="broadcasts to x's"):
        softmax(x, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="needs no gradient"):
        softmax(x, torch.zeros(4, requires_grad=True))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        softmax(torch.zeros(3), causal=True)


def test_it_compiles_in_one_graph() -> None:
    x = torch.randn(2, 4, 4, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return F.silu(softmax(x, scale=0.5, causal=True)).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    left, right = (torch.autograd.grad(f(x), x) for f in (run, compiled))
    torch.testing.assert_close(left, right)
