"""Weight-only quantised linear on GPUs: codes become floats in registers and meet x in tensor-core products.

A program has BLOCK_M rows of x and BLOCK_N channels, and takes k in chunks of 32, as the codes are packed
(linear.h). Codes are exact in bf16, fp16 and fp32, so each chunk's product is in x's dtype with fp32 sums;
then comes the group's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ds_kernels.cubins import Variant
from ds_kernels.ops.linear import make_reference, reference_dequantize
from ds_kernels.ops.linear_check import check_dequantize, check_linear
from ds_kernels.packed import Bits
from ds_kernels.registry import interpreting

BLOCK_M, BLOCK_N = 16, 32
# Rows of x from which the weight is dequantised for torch's own product (not measured: no GPU here).
_DENSE = 33


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """To nearest even, by hand to bf16: the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        up = tl.where(value == value, up, (bits >> 16) | 0x40)
        result = (up & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def _fp6(code):
    """e3m2 as a multiple of 1/16, then as a float."""
    exponent = (code >> 2) & 7
    mantissa = code & 3
    magnitude = tl.where(exponent > 0, (mantissa + 4) << tl.maximum(exponent - 1, 0), mantissa)
    return tl.where((code & 32) > 0, -magnitude, magnitude).to(tl.float32) * 0.0625


@triton.jit
def _codes_fp6(words, n, block, part: tl.constexpr, row_words, keep):
    """Chunk `part` of a block of 256 codes, from its 96 words."""
    j = tl.arange(0, 32)
    base = words + n[:, None].to(tl.int64) * row_words + block * 96 + j[None, :]
    if part < 6:
        word = tl.load(base + 32 * (part // 2), mask=keep, other=0).to(tl.int32)
        return (word >> (6 * (part % 2))) & 63
    elif part == 6:
        first = tl.load(base, mask=keep, other=0).to(tl.int32) & 0xFFFF
        second = tl.load(base + 32, mask=keep, other=0).to(tl.int32) & 0xFFFF
        return (first >> 12) | ((second >> 8) & 0x30)
    else:
        second = tl.load(base + 32, mask=keep, other=0).to(tl.int32) & 0xFFFF
        third = tl.load(base + 64, mask=keep, other=0).to(tl.int32) & 0xFFFF
        return (second >> 14) | ((third >> 10) & 0x3C)


@triton.jit
def _chunk(
    codes, zeros, n, block, part: tl.constexpr, group, groups, K, row, keep,
    BITS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """32 weights of every channel of n, without their scale: fp32 [BLOCK_N, 32]."""
    j = tl.arange(0, 32)
    if BITS == 8:
        k = block * 32 + j
        found = tl.load(
            codes + n[:, None].to(tl.int64) * row + k[None, :], mask=keep & (k < K)[None, :], other=0
        )
        return found.to(tl.float32)
    elif BITS == 4:
        word = tl.load(codes + n[:, None].to(tl.int64) * row + block * 32 + j[None, :], mask=keep, other=0)
        value = ((word.to(tl.int32) >> (4 * part)) & 15).to(tl.float32)
        if ZEROS:
            at = n.to(tl.int64) * groups + group
            return value - tl.load(zeros + at, mask=group < groups, other=0).to(tl.float32)[:, None]
        return value - 8.0
    else:
        return _fp6(_codes_fp6(codes, n, block, part, row, keep))


@triton.jit
def linear_kernel(
    x, codes, scales, zeros, bias, out, M, N, K, row, groups, group_chunks,
    BITS: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of out.

    row: elements (int8) or 16-bit words from one row of codes to the next. WIDE: x to fp32, for the
    interpreter, which takes bf16 for integers in products.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 32)
    keep = (n < N)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, tl.cdiv(K, 32 * PARTS)):
        for part in tl.static_range(PARTS):
            chunk = block * PARTS + part
            k = chunk * 32 + j
            group = chunk // group_chunks
            at = m[:, None].to(tl.int64) * K + k[None, :]
            value = tl.load(x + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            weight = _chunk(codes, zeros, n, block, part, group, groups, K, row, keep, BITS, ZEROS)
            if WIDE:
                value = value.to(tl.float32)
            product = tl.dot(value, tl.trans(weight.to(value.dtype)), input_precision="ieee")
            where = n.to(tl.int64) * groups + group
            scale = tl.load(scales + where, mask=(n < N) & (group < groups), other=0.0)
            total += product * scale[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + at, _rounded(total, out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def dequantize_kernel(
    codes, scales, zeros, out, N, K, row, groups, group_chunks,
    BITS: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of the weight of every channel of a tile, each element rounded once."""
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 32)
    keep = (n < N)[:, None]
    for part in tl.static_range(PARTS):
        k = (block * PARTS + part) * 32 + j
        group = (block * PARTS + part) // group_chunks
        weight = _chunk(codes, zeros, n, block, part, group, groups, K, row, keep, BITS, ZEROS)
        where = n.to(tl.int64) * groups + group
        scale = tl.load(scales + where, mask=(n < N) & (group < groups), other=0.0)
        at = n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(
            out + at, _rounded(weight * scale[:, None], out.dtype.element_ty), mask=keep & (k < K)[None, :]
        )


_PARTS = {8: 1, 4: 4, 6: 8}  # chunks that are packed together


def _weights(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, columns: int
) -> tuple[Any, ...]:
    """The codes as the kernels read them (16-bit words below 8 bits), and the lengths that go with them."""
    codes, scales = codes.contiguous(), scales.contiguous()
    if codes.dtype == torch.uint8 and codes.data_ptr() % 2:
        codes = codes.clone()
    words = codes.view(torch.int16) if codes.dtype == torch.uint8 else codes
    group_chunks = group // 32 if group else -(-columns // 32)
    kept = codes if zeros is None else zeros.contiguous()  # never read without zero points
    return words, scales, kept, (words.shape[1], scales.shape[1], max(1, group_chunks))


def make_linear(bits: Bits) -> Callable[..., Tensor]:
    """A quantised linear on the GPU."""
    reference = make_reference(bits)

    def launch(
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
        if batch >= _DENSE and x.dtype != torch.float16:  # whose range a weight may leave
            weight = dequantize(codes, scales, zeros, bits, group, columns, x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        x = x.contiguous()
        words, scales, kept, lengths = _weights(codes, scales, zeros, group, columns)
        out = x.new_empty((*x.shape[:-1], rows))
        linear_kernel[triton.cdiv(batch, BLOCK_M), triton.cdiv(rows, BLOCK_N)](
            x, words, scales, kept, x if bias is None else bias.contiguous(), out,
            batch, rows, columns, *lengths,
            BITS=bits, PARTS=_PARTS[bits], ZEROS=zeros is not None, BIAS=bias is not None,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, WIDE=interpreting(),
            num_warps=8 if x.dtype == torch.float32 else 4,
        )  # fmt: skip
        return out

    return launch


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """linear_dequantize on the GPU."""
    check_dequantize(codes, scales, zeros, bits, group, columns, dtype)
    if dtype == torch.float64 or not (codes.shape[0] and columns):
        return reference_dequantize(codes, scales, zeros, bits, group, columns, dtype)
    words, scales, kept, lengths = _weights(codes, scales, zeros, group, columns)
    out = scales.new_empty((codes.shape[0], columns), dtype=dtype)
    dequantize_kernel[triton.cdiv(codes.shape[0], BLOCK_N), triton.cdiv(columns, 32 * _PARTS[bits])](
        words, scales, kept, out, codes.shape[0], columns, *lengths,
        BITS=bits, PARTS=_PARTS[bits], ZEROS=zeros is not None, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    return out


def _variant(bits: int, kind: str, zeros: bool) -> Variant:
    words = "*i8" if bits == 8 else "*i16"
    signature = {
        "x": f"*{kind}", "codes": words, "scales": "*fp32", "zeros": "*u8" if zeros else words,
        "bias": f"*{kind}", "out": f"*{kind}",
        **dict.fromkeys(("M", "N", "K", "row", "groups", "group_chunks"), "i32"),
    }  # fmt: skip
    constants = {
        "BITS": bits,
        "PARTS": _PARTS[bits],
        "ZEROS": zeros,
        "BIAS": True,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "WIDE": False,
    }
    return Variant(linear_kernel, signature, constants, 8 if kind == "fp32" else 4)


def _dequantize_variant(bits: int, zeros: bool) -> Variant:
    words = "*i8" if bits == 8 else "*i16"
    signature = {
        "codes": words, "scales": "*fp32", "zeros": "*u8" if zeros else words, "out": "*bf16",
        **dict.fromkeys(("N", "K", "row", "groups", "group_chunks"), "i32"),
    }  # fmt: skip
    constants = {"BITS": bits, "PARTS": _PARTS[bits], "ZEROS": zeros, "BLOCK_N": BLOCK_N}
    return Variant(dequantize_kernel, signature, constants)


VARIANTS = [
    *(_variant(bits, kind, bits == 4) for bits in (8, 6, 4) for kind in ("bf16", "fp16", "fp32")),
    *(_dequantize_variant(bits, bits == 4) for bits in (8, 6, 4)),
]
