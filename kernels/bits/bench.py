"""Signs with error feedback, and sums of buffers, against eager torch and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_kernels import load
from ds_kernels.ops.bits import allocate_signs, pack_signs_, unpack_signs
from ds_kernels.ops.sums import sum_into_
from ds_kernels.sources.common.measure import Bench

NUMEL = 16 << 20


def torch_signs(value: Tensor, error: Tensor) -> Callable[[], Any]:
    """One scale, packed signs and the new error in eager torch."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

    def run() -> tuple[Tensor, Tensor]:
        error.add_(value)
        scale, above = error.abs().mean(), error >= 0
        error.sub_(torch.where(above, scale, -scale))
        return (above.view(-1, 8) * weights).sum(1, dtype=torch.uint8), scale

    return run


def torch_sum(sources: list[Tensor]) -> Tensor:
    """Four buffers in fp32, to bf16."""
    return (sources[0].float() + sources[1] + sources[2] + sources[3]).bfloat16()


def main() -> None:
    """All tables."""
    bench = Bench.from_command_line("bits")
    load("bits", torch.device("cpu"), strict=True)
    for dtype in (torch.float32, torch.bfloat16):
        value, error = torch.randn(NUMEL).to(dtype), torch.zeros(NUMEL)
        for block in (2048, None):
            made = allocate_signs((NUMEL,), block=block)
            run: dict[str, Callable[[], Any]] = {"ours": partial(pack_signs_, value, error, out=made)}
            if block is None:
                run["torch, eager"] = torch_signs(value, error)
            # Read value and error, write error: of one scale for all, error is read and written once more.
            moved = NUMEL * (value.element_size() + (8 if block else 16)) + NUMEL // 8
            bench.compare(
                f"{dtype} and error to signs, {f'blocks of {block}' if block else 'one scale'}", run, moved
            )
        ranks = pack_signs_(torch.randn(4, NUMEL), block=2048)
        out = torch.empty(NUMEL, dtype=dtype)
        moved = NUMEL * out.element_size() + NUMEL // 2
        bench.compare(f"signs of 4 ranks to {dtype}", {"ours": partial(unpack_signs, ranks, out=out)}, moved)
        sources = [torch.randn(NUMEL).to(dtype) for _ in range(4)]
        out = torch.empty(NUMEL, dtype=torch.bfloat16)
        bench.compare(
            f"4 buffers of {dtype} to bf16",
            {"ours": partial(sum_into_, out, sources), "torch, eager": partial(torch_sum, sources)},
            NUMEL * (4 * sources[0].element_size() + 2),
        )
    bench.finish()


if __name__ == "__main__":
    main()
