"""Norms on this machine, both directions: torch's own, after the addition of a residual or not, and ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kernels.ops import norm
from ds_kernels.sources.common.measure import Bench

ROWS, COLS = 1024, 4096


def compare(bench: Bench, kind: str, dtype: torch.dtype) -> None:
    """One norm in one dtype, in three ways."""
    x, residual, up = (torch.randn(ROWS, COLS).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(COLS).to(dtype) for _ in range(2))
    size = x.numel() * x.element_size()
    case = f"{kind}, {ROWS} x {COLS} {str(dtype).removeprefix('torch.')}"
    theirs: Callable[[Tensor], Tensor] = lambda v: F.rms_norm(v, (COLS,), weight, 1e-6)  # noqa: E731
    mine: Callable[..., Tensor] = partial(norm.rms_norm, weight=weight)
    added: Callable[..., Any] = partial(norm.add_rms_norm, weight=weight)
    if kind == "LayerNorm":
        theirs = lambda v: F.layer_norm(v, (COLS,), weight, bias)  # noqa: E731
        mine = partial(norm.layer_norm, weight=weight, bias=bias)
        added = partial(norm.add_layer_norm, weight=weight, bias=bias)
    bench.compare(f"{case}, forward", {"torch": lambda: theirs(x), "ours": lambda: mine(x)}, 2 * size)
    both = {"torch": lambda: theirs(x + residual), "ours": lambda: added(x, residual)}
    bench.compare(f"{case}, with a residual, forward", both, 4 * size)
    leaf = x.clone().requires_grad_()
    weight.requires_grad_()

    def gradient(y: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, (leaf, weight), up, retain_graph=True)

    bench.compare(
        f"{case}, backward", {"torch": gradient(theirs(leaf)), "ours": gradient(mine(leaf))}, 3 * size
    )


def main() -> None:
    """Run all."""
    bench = Bench.from_command_line("norm", rounds=25)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("RMSNorm", "LayerNorm"):
            compare(bench, kind, dtype)
    bench.finish()


if __name__ == "__main__":
    main()
