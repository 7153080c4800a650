"""What one call of the cross-entropy ops does not show: memory, bits, training dtypes, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.ops import cross_entropy as rows
from ds_kernels.ops.cross_entropy import cross_entropy
from ds_kernels.ops.linear_cross_entropy import OP, linear_cross_entropy
from ds_kernels.registry import load

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.fixture(autouse=True)
def loaded(own_cache: None) -> None:
    load("cross_entropy", CPU)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def given(tokens: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(classes, width, generator=generator) * width**-0.5).to(dtype)
    target = torch.randint(0, classes, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once during the call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_an_eighth_of_the_naive_one(dtype: torch.dtype) -> None:
    """Gradients of hidden and weight included, 32k classes."""
    hidden, weight, target = given(1024, 32, 32768, dtype)
    inputs = (hidden, weight)
    naive = peak_bytes(
        lambda: torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), target), inputs)
    )
    ours = peak_bytes(lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, target), inputs))
    print(f"{dtype}: naive {naive / 2**20:.0f} MiB, ours {ours / 2**20:.0f} MiB, {naive / ours:.1f} x")
    assert naive >= 2 * 1024 * 32768 * 4  # the logits and what becomes of them, in fp32
    assert 8 * ours <= naive


def test_in_place_allocates_nothing_of_the_logits_size() -> None:
    hidden, weight, target = given(256, 16, 4096, torch.float32)
    logits = (hidden @ weight.T).detach()
    want = logits.clone().requires_grad_()
    F.cross_entropy(want, target).mul(3).backward()
    # a gradient that reaches what made the logits, and the memory is theirs
    made = logits.clone().requires_grad_()
    copy = made * 1.0
    before = copy.data_ptr()
    seen: list[int] = []
    copy.register_hook(lambda g: seen.append(g.data_ptr()))
    grown = peak_bytes(lambda: (cross_entropy(copy, target, inplace=True) * 3).backward())
    assert seen == [before]
    assert grown < 1.1 * logits.numel() * 4  # the gradient of `made`, which is a leaf of its own
    torch.testing.assert_close(made.grad, want.grad, rtol=1e-5, atol=1e-9)


def test_in_place_is_refused_where_it_would_copy() -> None:
    logits = torch.randn(2, 5, 7)
    with pytest.raises(ValueError, match="shift the targets"):
        cross_entropy(logits[:, :-1], torch.zeros(2, 4, dtype=torch.int64), inplace=True)
    with pytest.raises(ValueError, match="'none'"):
        cross_entropy(logits, torch.zeros(2, 5, dtype=torch.int64), inplace=True, reduction="none")


def test_instruction_sets_and_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    hidden, weight, target = given(9, 8, 5003, torch.float32)
    logits = (hidden @ weight.T).detach() * 9
    handle = open_library("cross_entropy").handle
    found = []
    for isa in Native(handle).isas():
        for count in (1, 2):
            threads(count)
            library = rows._Library(Native(handle, Options(isa)))
            grad = logits.clone()
            losses = library.in_place(grad, target, torch.ones(9), **SETTINGS)
            found.append(
                torch.cat([losses, grad.reshape(-1), library.forward(logits, target, **SETTINGS)[1]])
            )
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 3, 6])
def test_it_is_torchs(reduction: Any, ignored: int) -> None:
    hidden, weight, target = given(6, 8, 50, torch.float32)
    target[:ignored] = -100
    smooth = {"label_smoothing": 0.1, "reduction": reduction}
    logits = F.linear(hidden, weight)
    want = F.cross_entropy(logits, target, **smooth)
    if ignored == 6 and reduction == "mean":
        want = (logits * 0).sum()  # torch says NaN
    upstream = torch.arange(6.0) if reduction == "none" else torch.tensor(2.0)
    grads = torch.autograd.grad(want, (hidden, weight), upstream)
    for mine in (
        linear_cross_entropy(hidden, weight, target, chunk=4, **smooth),
        cross_entropy(F.linear(hidden, weight), target, **smooth),
    ):
        torch.testing.assert_close(mine, want)
        torch.testing.assert_close(torch.autograd.grad(mine, (hidden, weight), upstream), grads)


def test_small_means_survive_half_precision() -> None:
    """A mean over 4096 tokens makes gradients of logits that fp16 cannot hold; a loss scale comes later."""
    hidden, weight, target = given(4096, 8, 300, torch.float16)
    scale = 1024.0
    want = torch.autograd.grad(
        F.cross_entropy(F.linear(hidden.float(), weight.float()), target) * scale, (hidden, weight)
    )
    mine = torch.autograd.grad(linear_cross_entropy(hidden, weight, target) * scale, (hidden, weight))
    for got, wanted in zip(mine, want, strict=True):
        assert torch.linalg.norm(got.float() - wanted.float()) < 2e-3 * torch.linalg.norm(wanted.float())


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, target = given(8, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target)
    assert loss.dtype == torch.float32
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(loss, low)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_targets_outside_are_refused() -> None:
    hidden, weight, target = given(4, 8, 20, torch.float32)
    target[2] = 20
    for call in (
        lambda: linear_cross_entropy(hidden, weight, target),
        lambda: cross_entropy(hidden @ weight.T, target),
    ):
        with pytest.raises(ValueError, match=r"target\[2\]=20 is not allowed: it must be in \[0, 20\)"):
            call()


def test_a_gradient_that_was_not_made_is_an_error() -> None:
    hidden, weight, target = given(4, 8, 20, torch.float32)
    total = OP(hidden, weight, None, target, torch.ones(4), **SETTINGS, chunk=2, grads=False)[0]
    with pytest.raises(RuntimeError, match="grads=False"):
        total.backward()


@pytest.mark.parametrize("function", ["rows", "linear"])
def test_it_compiles_in_one_graph(function: str) -> None:
    hidden, weight, target = given(6, 8, 50, torch.float32)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        if function == "rows":
            return cross_entropy(F.linear(hidden, weight), target)
        return linear_cross_entropy(hidden, weight, target)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    left = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    right = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(left, right)
