"""Tensors as rows [rows, n] with unit stride inside a row: what kernels over the last dimension work on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def read_rows(value: Tensor) -> Tensor:
    """A view if the layout allows it, else a copy; what is rows already, itself."""
    if value.dim() == 2 and value.stride(1) == 1:
        return value
    rows = value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def give_back(value: Tensor, rows: Tensor) -> None:
    """Copy what was written to `rows` to `value`, if `read_rows` had to copy."""
    if rows.data_ptr() != value.data_ptr():
        value.copy_(rows.view(value.shape))


def as_bytes(value: Tensor) -> Tensor:
    """The same memory as uint8, of a dtype of one byte."""
    return value if value.dtype == torch.uint8 else value.view(torch.uint8)
