"""Quantising and dequantising on this machine, against eager torch and a copy of as many bytes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ds_kernels import load
from ds_kernels.ops.quant import Blocks, FormatName, allocate_blocks, dequantize_blocks, quantize_blocks
from ds_kernels.ops.quant_formats import FORMATS
from ds_kernels.ops.quant_reduce import requantize_blocks, sum_blocks
from ds_kernels.sources.common.measure import Bench

NUMEL, BLOCK = 32 << 20, 256
NAMES: tuple[FormatName, ...] = ("int8", "uint8", "int4", "uint4", "e4m3", "e5m2", "e3m2", "e4m7")


def num_bytes(*tensors: Tensor | Blocks | None) -> int:
    """Bytes that a call must read or write."""
    total = 0
    for value in tensors:
        if isinstance(value, Blocks):
            total += num_bytes(value.codes, value.scales, value.zeros)
        elif value is not None:
            total += value.numel() * value.element_size()
    return total


def torch_int8(x: Tensor) -> Callable[[], Any]:
    """int8 blocks in eager torch."""
    blocks = x.view(-1, BLOCK)

    def run() -> tuple[Tensor, Tensor]:
        wide = blocks.float()
        scales = wide.abs().amax(1, keepdim=True) / 127
        return (wide / scales).round().to(torch.int8), scales

    return run


def torch_back(made: Blocks, dtype: torch.dtype) -> Tensor:
    """The inverse, in eager torch."""
    return (made.codes.view(-1, BLOCK).float() * made.scales[:, None]).to(dtype)


def step_by_step(received: Blocks, sent: Blocks) -> None:
    """A sum of chunks by way of memory."""
    quantize_blocks(dequantize_blocks(received).sum(0), out=sent)


def formats(bench: Bench) -> None:
    """Every format, from and to fp32 and bf16."""
    for dtype, name in product((torch.float32, torch.bfloat16), NAMES):
        x = torch.randn(NUMEL).to(dtype)
        out, made = torch.empty_like(x), allocate_blocks(x.shape, format=name, block=BLOCK)
        moved, kind = num_bytes(x, made), str(dtype).removeprefix("torch.")
        into: dict[str, Callable[[], Any]] = {"ours": partial(quantize_blocks, x, out=made)}
        back: dict[str, Callable[[], Any]] = {"ours": partial(dequantize_blocks, made, out=out)}
        if not FORMATS[name].exponent:
            into["ours, stochastic"] = partial(quantize_blocks, x, rounding="stochastic", seed=1, out=made)
        if name == "int8":
            into["torch, eager"], back["torch, eager"] = torch_int8(x), partial(torch_back, made, dtype)
        bench.compare(f"{kind} to {name}", into, moved)
        bench.compare(f"{name} to {kind}", back, moved)


def reductions(bench: Bench) -> None:
    """Four received chunks summed, and quantised again: what a rank of a compressed reduce-scatter does."""
    for name in NAMES[0], NAMES[2]:
        received = quantize_blocks(torch.randn(4, NUMEL // 4), format=name, block=BLOCK)
        out, sent = torch.empty(NUMEL // 4), allocate_blocks((NUMEL // 4,), format=name)
        both: dict[str, Callable[[], Any]] = {
            "ours": partial(requantize_blocks, received, out=sent),
            "ours, step by step": partial(step_by_step, received, sent),
        }
        one = {"ours": partial(sum_blocks, received, out=out)}
        bench.compare(f"sum of 4 {name} chunks to fp32", one, num_bytes(received, out))
        bench.compare(f"sum of 4 {name} chunks to {name}", both, num_bytes(received, sent))


def main() -> None:
    """All tables."""
    bench = Bench.from_command_line("quant", rounds=11)
    load("quant", torch.device("cpu"), strict=True)
    for peer, why in (("torchao", "is not installed"), ("deepspeed", "quantises on GPUs only")):
        if importlib.util.find_spec(peer) is None or peer == "deepspeed":
            print(f"{peer}: skipped, because it {why}", file=sys.stderr)
    formats(bench)
    reductions(bench)
    bench.finish()


if __name__ == "__main__":
    main()
