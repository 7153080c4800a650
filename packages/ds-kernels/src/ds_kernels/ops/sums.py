"""Sums of several buffers into one of another dtype: casts and reductions of shared memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, address, code, pointers, written
from ds_kernels.ops import bits as bits  # its ops are of this family
from ds_kernels.registry import Kernel, define, ready

NAME = "sum_into_"


@torch.no_grad()
def sum_into_(out: Tensor, sources: Sequence[Tensor], *, factor: float = 1.0) -> Tensor:
    """Set `out` to the sum of `sources`, in order and in fp32, times `factor`, rounded once; of one, a cast.

    Shapes: as many elements in each source as in `out`, taken flat; sources of one dtype, any of fp32, bf16
    and fp16, `out` too. A source may be `out` itself, but not overlap it otherwise. On the CPU memory
    may start at any byte.
    """
    ready("bits", out.device)
    OP(out, list(sources), factor)
    return out


def _check(out: Tensor, sources: Sequence[Tensor], factor: float = 1.0) -> None:
    check.tensor(NAME, "out", out, dtypes=DTYPES)
    kinds = (sources[0].dtype,) if sources and sources[0].dtype in DTYPES else DTYPES
    for i, source in enumerate(sources):
        check.tensor(NAME, f"sources[{i}]", source, dtypes=kinds, numel=out.numel(), device=out.device)
    check.number(NAME, "factor", factor, "finite", math.isfinite(factor))


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.data_ptr(), one.dtype, one.shape) == (other.data_ptr(), other.dtype, other.shape)
    return alike and one.stride() == other.stride()


Run = Callable[[Tensor, list[Tensor], float], None]


def sum_with(run: Run) -> Callable[..., None]:
    """The op over something that sums contiguous tensors."""

    def sum_into(out: Tensor, sources: list[Tensor], factor: float = 1.0) -> None:
        _check(out, sources, factor)
        for i, source in enumerate(sources):
            if not _same(out, source):
                check.apart(NAME, {"out": out, f"sources[{i}]": source}, (f"sources[{i}]",))
        if not out.numel() or out.is_meta:
            return
        whole = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        run(whole, [source.contiguous() for source in sources], factor)
        if whole is not out:
            out.copy_(whole)

    return sum_into


def sum_flat(out: Tensor, sources: list[Tensor], factor: float) -> None:
    """The reference."""
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for source in sources:
        total += source.view(out.shape)
    out.copy_(total * torch.tensor(factor, dtype=torch.float32, device=out.device))


def _native(library: Native) -> Callable[..., None]:
    integer, long, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    native = library.function(
        "ds_sum_into", pointer, integer, pointer, integer, long, long, ctypes.c_float, integer, integer
    )

    def run(out: Tensor, sources: list[Tensor], factor: float) -> None:
        places = pointers(sources)
        native(
            out.data_ptr(), code(out.dtype), address(places), code(sources[0].dtype) if sources else 0,
            len(sources), out.numel(), factor, library.isa_code, torch.get_num_threads(),
        )  # fmt: skip
        written([out])

    return sum_with(run)


OP = define(
    Kernel(
        name=NAME,
        schema="(Tensor(a!) out, Tensor[] sources, float factor=1.0) -> ()",
        family="bits",
        reference=sum_with(sum_flat),
        fake=_check,
        native=_native,
        triton=lambda module: sum_with(cast(Run, module.sum_flat)),
    )
)
