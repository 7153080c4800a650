"""Rotary embedding on this machine: Llama's expression in torch, and ours, out of place and in place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ds_kernels.ops.rope import rotary, rotary_, rotary_tables
from ds_kernels.sources.common.measure import Bench

BATCH, TOKENS, HEADS, WIDTH = 2, 512, 32, 128


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, heads, D]; cos and sin [T, 1, D] in x's dtype, made once, as in Llama's modelling code."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def main() -> None:
    """Run all."""
    bench = Bench.from_command_line("rope", rounds=25)
    for dtype in (torch.float32, torch.bfloat16):
        x, up = (torch.randn(BATCH, TOKENS, HEADS, WIDTH).to(dtype) for _ in range(2))
        cos, sin = rotary_tables(TOKENS, WIDTH)
        double = [torch.cat([t, t], -1)[:, None].to(dtype) for t in (cos, sin)]
        size = x.numel() * x.element_size()
        case = f"{BATCH} x {TOKENS} x {HEADS} x {WIDTH} {str(dtype).removeprefix('torch.')}"
        work = x.clone()
        forward = {
            "torch": partial(llama, x, *double),
            "ours": partial(rotary, x, cos, sin),
            "ours, interleaved": partial(rotary, x, cos, sin, interleaved=True),
            "ours, in place": partial(rotary_, work, cos, sin),
        }
        bench.compare(f"{case}, forward", forward, 2 * size)
        leaf = x.clone().requires_grad_()
        backward = {
            name: partial(torch.autograd.grad, y, leaf, up, retain_graph=True)
            for name, y in (("torch", llama(leaf, *double)), ("ours", rotary(leaf, cos, sin)))
        }
        bench.compare(f"{case}, backward", backward, 2 * size)
    bench.finish()


if __name__ == "__main__":
    main()
