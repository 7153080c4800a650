"""What the linear ops allow: names, dtypes and shapes of what a packed weight is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES
from ds_kernels.packed import Bits, check_group, code_shape, groups_of

NAMES: dict[Bits, str] = {8: "linear_int8", 4: "linear_int4", 6: "linear_fp6"}
_FLOATS = (*DTYPES, torch.float64)  # float64 runs the reference, for checks of gradients


def _check_weight(
    op: str, bits: Bits, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, columns: int
) -> None:
    check_group(op, group)
    check.number(op, "columns", columns, ">= 0", columns >= 0)
    dtype, length = code_shape(bits, columns)
    check.tensor(op, "codes", codes, dtypes=(dtype,), shape=(None, length))
    shape = (codes.shape[0], groups_of(columns, group))
    check.tensor(op, "scales", scales, dtypes=(torch.float32,), device=codes.device, shape=shape)
    if zeros is not None and bits != 4:
        check.refuse(op, "zeros", zeros, "None: only 4-bit codes have zero points")
    if zeros is not None:
        check.tensor(op, "zeros", zeros, dtypes=(torch.uint8,), device=codes.device, shape=shape)


def _check_bias(op: str, x: Tensor, bias: Tensor | None, rows: int) -> None:
    if bias is not None:
        check.tensor(op, "bias", bias, dtypes=_FLOATS, device=x.device, shape=(rows,))


def check_linear(
    bits: Bits,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
    columns: int,
) -> None:
    """Raise ValueError for anything that the quantised linears do not allow."""
    op = NAMES[bits]
    check.tensor(op, "x", x, dtypes=_FLOATS, device=codes.device, dims=1)
    if x.shape[-1] != columns:
        check.refuse(op, "x", x, f"a last dimension of columns={columns}")
    _check_weight(op, bits, codes, scales, zeros, group, columns)
    _check_bias(op, x, bias, codes.shape[0])


def check_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for anything that linear_bf16 does not allow."""
    op = "linear_bf16"
    check.tensor(op, "x", x, dtypes=(torch.bfloat16, torch.float64), dims=1)
    check.tensor(op, "weight", weight, dtypes=(x.dtype,), device=x.device, shape=(None, x.shape[-1]))
    _check_bias(op, x, bias, weight.shape[0])


def check_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Bits:
    """Raise ValueError for anything that linear_dequantize does not allow; give the bits back."""
    op = "linear_dequantize"
    check.number(op, "bits", bits, "8, 6 or 4", bits in NAMES)
    check.number(op, "dtype", 0, f"one of {check.names(_FLOATS)}", dtype in _FLOATS)
    known: Bits = 8 if bits == 8 else 6 if bits == 6 else 4
    _check_weight(op, known, codes, scales, zeros, group, columns)
    return known
