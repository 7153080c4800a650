"""Softmax of attention scores on this machine, torch's operators and ours: plain, masked, backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ds_kernels.ops.softmax import softmax
from ds_kernels.sources.common.measure import Bench

SHAPE = (1, 8, 512, 1024)


def torchs(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Operator by operator; in fp32, as models do it."""
    v = x.float() * scale
    v = v if mask is None else v.masked_fill(mask, -torch.inf)
    return v.softmax(-1).to(x.dtype)


def main() -> None:
    """Run all."""
    bench = Bench.from_command_line("softmax", rounds=25)
    for dtype in (torch.float32, torch.bfloat16):
        x, up = (torch.randn(*SHAPE).to(dtype) for _ in range(2))
        size = x.numel() * x.element_size()
        queries, keys = SHAPE[-2:]
        case = f"{' x '.join(map(str, SHAPE))} {str(dtype).removeprefix('torch.')}"
        late = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        plain = {"torch": partial(torch.softmax, x, -1), "ours": partial(softmax, x)}
        bench.compare(f"{case}, plain", plain, 2 * size)
        masked = {
            "torch": partial(torchs, x, late, 0.1),
            "ours, causal": partial(softmax, x, scale=0.1, causal=True),
            "ours, masked": partial(softmax, x, ~late, scale=0.1),
        }
        bench.compare(f"{case}, scaled and masked", masked, 2 * size)
        leaf = x.clone().requires_grad_()
        backward = {
            name: partial(torch.autograd.grad, y, leaf, up, retain_graph=True)
            for name, y in (
                ("torch", torchs(leaf, late, 0.1)),
                ("ours", softmax(leaf, scale=0.1, causal=True)),
            )
        }
        bench.compare(f"{case}, backward", backward, 3 * size)
    bench.finish()


if __name__ == "__main__":
    main()
