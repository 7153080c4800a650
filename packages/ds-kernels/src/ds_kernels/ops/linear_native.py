"""The linear ops over their library for CPU tensors, and which way is the fastest for how many rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_kernels.native import DTYPES, Native, code
from ds_kernels.ops.linear_check import check_bf16, check_dequantize, check_linear
from ds_kernels.packed import Bits

FORMATS: dict[int, int] = {16: 0, 8: 1, 4: 2, 6: 3}  # Format of kernels/linear/linear.h


@dataclass(frozen=True)
class Routes:
    """From how many rows of x on another way than our own loops is taken. Measured: kernels/linear/README.md.

    dense: quantised weights in bf16 are dequantised and given to torch's matrix product.
    plain: bf16 weights are given to torch.nn.functional.linear.
    """

    dense: int
    plain: int

    @classmethod
    def here(cls, library: Native) -> Routes:
        """For this processor: torch's product has the matrix units (AMX), which our loops have not."""
        fast = bool(library.handle.ds_linear_has_dot512()) and library.isa == "avx512"
        if not fast:
            return cls(dense=32, plain=0)
        return cls(dense=32 if torch.cpu._is_amx_tile_supported() else 512, plain=17)


class _Call(ctypes.Structure):
    """DsLinearCall of sources/linear/linear_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "group")),
        *((name, ctypes.c_int32) for name in ("format", "x_dtype", "isa", "without_bf16", "threads")),
    )


def make_native(
    library: Native,
    bits: Bits,
    reference: Callable[..., Tensor],
    routes: Routes | None = None,
    without_bf16: bool = False,
) -> Callable[..., Tensor]:
    """A quantised linear for CPU tensors; `without_bf16` leaves bf16 instructions out, for tests."""
    run = library.function("ds_linear", ctypes.POINTER(_Call))
    dequantize = make_native_dequantize(library, reference)
    routes = routes or Routes.here(library)

    def native(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        group: int,
        columns: int,
    ) -> Tensor:
        check_linear(bits, x, codes, scales, zeros, bias, group, columns)
        rows = codes.shape[0]
        batch = x.numel() // columns if columns else 0
        if x.dtype == torch.float64 or not (batch and rows):
            return reference(x, codes, scales, zeros, bias, group, columns)
        if batch >= routes.dense and x.dtype == torch.bfloat16:
            weight = dequantize(codes, scales, zeros, bits, group, columns, x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        out = x.new_empty((*x.shape[:-1], rows))
        run(
            _Call(
                x.data_ptr(), codes.data_ptr(), scales.data_ptr(),
                None if zeros is None else zeros.data_ptr(), None if bias is None else bias.data_ptr(),
                out.data_ptr(), batch, rows, columns, group, FORMATS[bits], code(x.dtype),
                library.isa_code, without_bf16, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    return native


def make_native_bf16(
    library: Native, reference: Callable[..., Tensor], routes: Routes | None = None
) -> Callable[..., Tensor]:
    """linear_bf16 for CPU tensors: our loops for few rows, torch's own for many."""
    run = library.function("ds_linear", ctypes.POINTER(_Call))
    routes = routes or Routes.here(library)

    def native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        check_bf16(x, weight, bias)
        columns, rows = x.shape[-1], weight.shape[0]
        batch = x.numel() // columns if columns else 0
        if x.dtype != torch.bfloat16 or not (batch and rows):
            return reference(x, weight, bias)
        if batch >= routes.plain or columns % 32:
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        out = x.new_empty((*x.shape[:-1], rows))
        run(
            _Call(
                x.data_ptr(), weight.data_ptr(), None, None, None if bias is None else bias.data_ptr(),
                out.data_ptr(), batch, rows, columns, 0, FORMATS[16], code(x.dtype),
                library.isa_code, False, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    return native


def make_native_dequantize(library: Native, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """linear_dequantize for CPU tensors."""
    run = library.function("ds_linear_dequantize", ctypes.POINTER(_Call))

    def native(
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group: int,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        check_dequantize(codes, scales, zeros, bits, group, columns, dtype)
        if dtype not in DTYPES or not (codes.shape[0] and columns):
            return reference(codes, scales, zeros, bits, group, columns, dtype)
        codes, scales = codes.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        out = codes.new_empty((codes.shape[0], columns), dtype=dtype)
        run(
            _Call(
                None, codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), None,
                out.data_ptr(), 0, codes.shape[0], columns, group, FORMATS[bits], code(dtype),
                library.isa_code, False, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    return native
