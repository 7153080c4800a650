"""Cross entropy on this machine, torch's and ours, with and without the linear layer: time, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ds_kernels.ops.cross_entropy import cross_entropy
from ds_kernels.ops.linear_cross_entropy import linear_cross_entropy
from ds_kernels.sources.common.measure import Bench


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once during a call, above what it held before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def rows(bench: Bench, dtype: torch.dtype, tokens: int, classes: int) -> None:
    """Logits that are there already."""
    logits = torch.randn(tokens, classes).to(dtype)
    leaf = logits.clone().requires_grad_()
    target = torch.randint(0, classes, (tokens,))
    name = f"{tokens} x {classes} {str(dtype).removeprefix('torch.')}"

    def gradient(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, leaf)

    size = logits.numel() * logits.element_size()
    forward = {
        "torch": lambda: F.cross_entropy(logits, target),
        "ours": lambda: cross_entropy(logits, target),
    }
    bench.compare(f"loss, {name}", forward, size)
    backward = {
        "torch": lambda: gradient(F.cross_entropy(leaf, target)),
        "ours": lambda: gradient(cross_entropy(leaf, target)),
        "ours, in place": lambda: cross_entropy(logits, target, inplace=True),
    }
    bench.compare(f"loss and gradient, {name}", backward, 2 * size)


def linear(bench: Bench, dtype: torch.dtype, tokens: int, width: int, classes: int) -> None:
    """From the hidden states, forward and backward."""
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) * width**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (tokens,))

    def naive() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), target), (hidden, weight))

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))

    found = {"torch": naive, "ours": ours}
    peaks = {name: peak_bytes(run) for name, run in found.items()}
    case = f"linear and loss, {tokens} x {width} -> {classes} {str(dtype).removeprefix('torch.')}"
    bench.compare(case, found, 4 * tokens * classes, peak_bytes=peaks)
    words = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in peaks.items())
    print(f"peak memory: {words}, {peaks['torch'] / peaks['ours']:.1f} x less")


def main() -> None:
    """Run all."""
    bench = Bench.from_command_line("cross_entropy", rounds=7)
    for dtype in (torch.float32, torch.bfloat16):
        rows(bench, dtype, 512, 32768)
        linear(bench, dtype, 2048, 64, 32768)
        linear(bench, dtype, 4096, 512, 32768)
    bench.finish()


if __name__ == "__main__":
    main()
