"""Activations and dropout on this machine, both directions: torch's own operators, and ours in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kernels.ops.activation import bias_gelu, swiglu
from ds_kernels.ops.dropout import bias_dropout_add
from ds_kernels.sources.common.measure import Bench

ROWS, COLS = 1024, 4096


def gradients(y: Tensor, leaves: list[Tensor], up: Tensor) -> Callable[[], Any]:
    """The backward of a graph that is kept."""
    return lambda: torch.autograd.grad(y, leaves, up, retain_graph=True)


def compare(bench: Bench, dtype: torch.dtype) -> None:
    """Everything in one dtype."""
    x, other, up = (torch.randn(ROWS, COLS).to(dtype) for _ in range(3))
    packed = torch.randn(ROWS, 2 * COLS).to(dtype)
    bias = torch.randn(COLS).to(dtype)
    size, what = x.numel() * x.element_size(), f"{ROWS} x {COLS} {str(dtype).removeprefix('torch.')}"
    pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], int]] = {
        "swiglu": (lambda a, b: F.silu(a) * b, swiglu, [x, other], 3),
        "swiglu, packed": (_packed_swiglu, swiglu, [packed], 3),
        "gelu": (F.gelu, bias_gelu, [x], 2),
        "bias and gelu": (lambda a, b: F.gelu(a + b), bias_gelu, [x, bias], 2),
        "bias and gelu by tanh": (_gelu_tanh, lambda a, b: bias_gelu(a, b, kind="gelu_tanh"), [x, bias], 2),
        "bias, dropout, residual": (
            lambda a, r, b: r + F.dropout(a + b, 0.1),
            lambda a, r, b: bias_dropout_add(a, r, b, p=0.1),
            [x, other, bias],
            3,
        ),
    }
    for name, (theirs, mine, given, streams) in pairs.items():
        forward = {"torch": lambda f=theirs, g=given: f(*g), "ours": lambda f=mine, g=given: f(*g)}
        bench.compare(f"{name}, {what}, forward", forward, streams * size)
        leaves = [t.clone().requires_grad_() for t in given]
        backward = {k: gradients(f(*leaves), leaves, up) for k, f in (("torch", theirs), ("ours", mine))}
        moved = {"swiglu": 5, "swiglu, packed": 5, "bias, dropout, residual": 2}.get(name, 3)
        bench.compare(f"{name}, {what}, backward", backward, moved * size)


def _packed_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def main() -> None:
    """Run all."""
    bench = Bench.from_command_line("activation", rounds=25)
    for dtype in (torch.float32, torch.bfloat16):
        compare(bench, dtype)
    bench.finish()


if __name__ == "__main__":
    main()
