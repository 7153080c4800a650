"""Sums of several ranks' buffers in rank order, against torch and a copy of as many bytes, in one process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_kernels.native import code
from ds_kernels.shm import Call, addresses, load_shm
from ds_kernels.sources.common.measure import Bench

NUMEL = 16 << 20


def ours(out: Tensor, sources: list[Tensor]) -> Callable[[], Any]:
    library, places = load_shm(), addresses([source.data_ptr() for source in sources])
    call = Call(places=ctypes.addressof(places), world=len(sources), isa=library.isa_code)
    held = places, sources  # what the call points to
    dtypes = code(out.dtype), code(sources[0].dtype)

    def run() -> None:
        call.threads = torch.get_num_threads()
        library.sum(ctypes.byref(call), out.data_ptr(), *dtypes, 0, out.numel(), 1.0)
        assert held

    return run


def torchs(out: Tensor, sources: list[Tensor]) -> None:
    """The definition: each sum rounded to the output's dtype."""
    out.copy_(sources[0])
    for source in sources[1:]:
        out.add_(source.to(out.dtype))


def main() -> None:
    """All tables."""
    bench = Bench.from_command_line("shm")
    for out_dtype, dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        for ranks in (2, 4):
            sources = [torch.randn(NUMEL).to(dtype) for _ in range(ranks)]
            out = torch.empty(NUMEL, dtype=out_dtype)
            bench.compare(
                f"{ranks} buffers of {dtype} to {out_dtype}",
                {"ours": ours(out, sources), "torch": partial(torchs, out, sources)},
                NUMEL * (ranks * dtype.itemsize + out_dtype.itemsize),
            )
    bench.finish()


if __name__ == "__main__":
    main()
