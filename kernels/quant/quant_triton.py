"""Block-wise quantisation for GPUs: some blocks of a row to a program, each read once.

The arithmetic of a value is that of encode_loop.h and decode_loop.h, operation by operation; launches forbid
fused multiply-adds, so that the bits are the same. Indexes of elements are 64 bits wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops.quant import Parts
from ds_kernels.ops.quant_formats import FORMATS, Format, Rounding

TILE = 1024  # elements of a program, unless a block is longer


@triton.jit
def _last_product(value, key):
    value = ((value ^ (value >> 16)) * 0x7FEB352D) ^ key
    return (value ^ (value >> 15)) * 0x846CA68B


@triton.jit
def _mix(value):
    value = _last_product(value, value * 0)
    return value ^ (value >> 16)


@triton.jit
def _draws(number, seed, at):
    """16 bits for elements `at` of block `number`; see [Note: draws] in encode_loop.h."""
    seed = number * 0 + seed  # 64 bits wide, whatever the launch made of it
    key = _mix((number >> 32).to(tl.uint32) ^ 0x9E3779B9)
    key = _mix(key ^ number.to(tl.uint32))
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    key = _mix(key ^ seed.to(tl.uint32))
    second = _mix(key + 0x9E3779B9)
    place = (at // 64 * 16 + at % 16).to(tl.uint32)
    half = (_last_product(place + key, second) >> (at // 16 % 2 * 16).to(tl.uint32)) & 0xFFFF
    return tl.where(at // 32 % 2 == 0, half, (half * 40503) & 0xFFFF).to(tl.int32)


@triton.jit
def _to_nearest(x):
    """An integer, ties to even, for magnitudes up to 2^24."""
    whole = tl.floor(x)
    number, rest = whole.to(tl.int32), x - whole
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 != 0))).to(tl.int32)


@triton.jit
def _encode(x, valid, number, seed, at, TOP: tl.constexpr, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr,
            MANTISSA: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """Values [blocks, groups, codes of a group] to codes, scales and zeros."""
    bits = x.to(tl.int32, bitcast=True)
    if ASYMMETRIC:  # ordered as integers as the floats are, NaNs beyond the infinities
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        low = tl.min(tl.min(tl.where(valid, order, 0x7FFFFFFF), 2), 1)
        high = tl.max(tl.max(tl.where(valid, order, -0x80000000), 2), 1)
        zero = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) + 0.0
        size = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - zero
    else:
        high = tl.max(tl.max(tl.where(valid, bits & 0x7FFFFFFF, 0), 2), 1)
        size = high.to(tl.float32, bitcast=True)
        zero = size * 0
    fits = size < 1.7014118346046923e38
    quotient = tl.div_rn(size, size * 0 + TOP)
    scale = tl.where(quotient > 1.1754943508222875e-38, quotient, 1.1754943508222875e-38)
    inverse = tl.div_rn(size * 0 + 1.0, scale)[:, None, None]
    if EXPONENT > 0:
        code = _float_codes(x * inverse, EXPONENT, MANTISSA)
    else:
        scaled = x * inverse
        if ASYMMETRIC:
            scaled = (x - zero[:, None, None]) * inverse
        if STOCHASTIC:
            most: tl.constexpr = (1 << BITS) - 1 if ASYMMETRIC else (1 << (BITS - 1)) - 1
            least: tl.constexpr = 0 if ASYMMETRIC else -most
            parts = tl.where(fits[:, None, None], scaled * 65536.0, 0.0)
            code = (_to_nearest(parts) + _draws(number, seed, at)) >> 16
            code = tl.minimum(tl.maximum(code, least), most) & ((1 << BITS) - 1)
        else:
            code = (scaled + 12582912.0).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    code = tl.where(fits[:, None, None] & valid, code, 0)
    return code, tl.where(fits, scale, float("nan")), tl.where(fits, zero, float("nan"))


@triton.jit
def _float_codes(scaled, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    DROP: tl.constexpr = 23 - MANTISSA
    SIGN: tl.constexpr = EXPONENT + MANTISSA
    SHIFT: tl.constexpr = (128 - BIAS - MANTISSA + 23) << 23
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + ((1 << (DROP - 1)) - 1 - ((127 - BIAS) << 23)) + ((size >> DROP) & 1)) >> DROP
    shift = (size * 0 + SHIFT).to(tl.float32, bitcast=True)
    subnormal = (size.to(tl.float32, bitcast=True) + shift).to(tl.int32, bitcast=True) - SHIFT
    code = tl.where(size < ((128 - BIAS) << 23), subnormal, normal)
    return code | ((bits < 0).to(tl.int32) << SIGN)


@triton.jit
def _decode(code, scale, zero, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BITS: tl.constexpr,
            ASYMMETRIC: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip
    """Codes [blocks, groups, codes of a group] to values."""
    if EXPONENT > 0:
        BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
        LEAST: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA)
        size = code & ((1 << (BITS - 1)) - 1)
        normal = ((size << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < (1 << MANTISSA), size.to(tl.float32) * LEAST, normal)
        value = tl.where(size > LARGEST, float("nan"), value)
        value = tl.where(code >= (1 << (BITS - 1)), -value, value)
    elif ASYMMETRIC:
        value = code.to(tl.float32)
    else:
        value = ((code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)
    value = value * scale[:, None, None]
    if ASYMMETRIC:
        value = value + zero[:, None, None]
    return value


@triton.jit
def _to(value, dtype: tl.constexpr):
    """Rounded to nearest even, by hand to bf16: the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, (bits >> 16) | 0x40)
        result = (rounded & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def _pack(codes, base, code, valid, group, PER: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    whole = tl.sum(code << (tl.arange(0, PER)[None, None, :] * BITS), 2)
    some = tl.max(valid.to(tl.int32), 2) > 0
    for k in tl.static_range(BYTES):
        byte = ((whole >> (8 * k)) & 255).to(tl.uint8)
        tl.store(codes + base[:, None] + group[None, :] * BYTES + k, byte, mask=some)


@triton.jit
def _unpack(codes, base, valid, group, PER: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    some = tl.max(valid.to(tl.int32), 2) > 0
    whole = tl.zeros(some.shape, tl.int32)
    for k in tl.static_range(BYTES):
        byte = tl.load(codes + base[:, None] + group[None, :] * BYTES + k, mask=some, other=0)
        whole += byte.to(tl.int32) << (8 * k)
    return (whole[:, :, None] >> (tl.arange(0, PER)[None, None, :] * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _places(rows, numel, block, R: tl.constexpr, G: tl.constexpr, PER: tl.constexpr):
    """Of this program's blocks: number, row, place in it, first element, which elements there are."""
    each = (numel + block - 1) // block
    number = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row, k = number // each, number % each
    start = k * block
    group = tl.arange(0, G)
    at = group[:, None] * PER + tl.arange(0, PER)[None, :]
    there = (row < rows)[:, None, None]
    valid = there & (at < block)[None, :, :] & (start[:, None, None] + at[None, :, :] < numel)
    return number, row, k, start, group, at, valid


@triton.jit
def quantize_kernel(
    x, codes, scales, zeros, x_stride, codes_stride, scales_stride, zeros_stride,
    rows, numel, block, seed, first_block,
    TOP: tl.constexpr, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    number, row, k, start, group, at, valid = _places(rows, numel, block, R, G, PER)
    values = tl.load(x + (row * x_stride + start)[:, None, None] + at[None, :, :], mask=valid, other=0.0)
    number = (number + first_block)[:, None, None]
    code, scale, zero = _encode(
        values.to(tl.float32), valid, number, seed, at[None, :, :], TOP, ASYMMETRIC, EXPONENT, MANTISSA, BITS,
        STOCHASTIC,
    )  # fmt: skip
    _pack(codes, row * codes_stride + start // PER * BYTES, code, valid, group, PER, BYTES, BITS)
    tl.store(scales + row * scales_stride + k, scale, mask=row < rows)
    if ASYMMETRIC:
        tl.store(zeros + row * zeros_stride + k, zero, mask=row < rows)


@triton.jit
def _read_blocks(
    codes, scales, zeros, codes_stride, scales_stride, zeros_stride, row, k, start, group, valid, there,
    ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BITS: tl.constexpr,
    PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    code = _unpack(codes, row * codes_stride + start // PER * BYTES, valid, group, PER, BYTES, BITS)
    scale = tl.load(scales + row * scales_stride + k, mask=there, other=0.0)
    zero = scale
    if ASYMMETRIC:
        zero = tl.load(zeros + row * zeros_stride + k, mask=there, other=0.0)
    return _decode(code, scale, zero, EXPONENT, MANTISSA, BITS, ASYMMETRIC, LARGEST)


@triton.jit
def dequantize_kernel(
    codes, scales, zeros, out, codes_stride, scales_stride, zeros_stride, out_stride, rows, numel, block,
    TOP: tl.constexpr, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
    ADD: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    _, row, k, start, group, at, valid = _places(rows, numel, block, R, G, PER)
    value = _read_blocks(
        codes, scales, zeros, codes_stride, scales_stride, zeros_stride,
        row, k, start, group, valid, row < rows,
        ASYMMETRIC, EXPONENT, MANTISSA, BITS, PER, BYTES, LARGEST,
    )  # fmt: skip
    place = out + (row * out_stride + start)[:, None, None] + at[None, :, :]
    if ADD:
        value = tl.load(place, mask=valid, other=0.0).to(tl.float32) + value
    tl.store(place, _to(value, out.dtype.element_ty), mask=valid)


@triton.jit
def _sum_of_chunks(
    codes, scales, zeros, codes_stride, scales_stride, zeros_stride, chunks, k, start, group, valid, there,
    factor, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BITS: tl.constexpr,
    PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    total = tl.zeros(valid.shape, tl.float32)
    row = k * 0
    for _ in range(chunks):
        total += _read_blocks(
            codes, scales, zeros, codes_stride, scales_stride, zeros_stride,
            row, k, start, group, valid, there,
            ASYMMETRIC, EXPONENT, MANTISSA, BITS, PER, BYTES, LARGEST,
        )  # fmt: skip
        row += 1
    return total * factor


@triton.jit
def sum_kernel(
    codes, scales, zeros, out, codes_stride, scales_stride, zeros_stride, chunks, numel, block, factor,
    TOP: tl.constexpr, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    _, row, k, start, group, at, valid = _places(1, numel, block, R, G, PER)
    total = _sum_of_chunks(
        codes, scales, zeros, codes_stride, scales_stride, zeros_stride,
        chunks, k, start, group, valid, row < 1, factor,
        ASYMMETRIC, EXPONENT, MANTISSA, BITS, PER, BYTES, LARGEST,
    )  # fmt: skip
    tl.store(out + start[:, None, None] + at[None, :, :], _to(total, out.dtype.element_ty), mask=valid)


@triton.jit
def _regroup(x, R: tl.constexpr, G: tl.constexpr, PER: tl.constexpr):
    """The same elements in groups of another format."""
    return tl.reshape(x, (R, G, PER))


@triton.jit
def requantize_kernel(
    codes, scales, zeros, out_codes, out_scales, out_zeros, codes_stride, scales_stride, zeros_stride,
    chunks, numel, block, seed, first_block, factor,
    TOP: tl.constexpr, ASYMMETRIC: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr,
    TO_TOP: tl.constexpr, TO_ASYMMETRIC: tl.constexpr, TO_EXPONENT: tl.constexpr, TO_MANTISSA: tl.constexpr,
    TO_BITS: tl.constexpr, TO_PER: tl.constexpr, TO_BYTES: tl.constexpr, TO_LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    number, row, k, start, group, at, valid = _places(1, numel, block, R, G, PER)
    total = _sum_of_chunks(
        codes, scales, zeros, codes_stride, scales_stride, zeros_stride,
        chunks, k, start, group, valid, row < 1, factor,
        ASYMMETRIC, EXPONENT, MANTISSA, BITS, PER, BYTES, LARGEST,
    )  # fmt: skip
    if TO_PER != PER:
        total = _regroup(total, R, G * PER // TO_PER, TO_PER)
        _, _, _, _, group, at, valid = _places(1, numel, block, R, G * PER // TO_PER, TO_PER)
    number = (number + first_block)[:, None, None]
    code, scale, zero = _encode(
        total, valid, number, seed, at[None, :, :], TO_TOP, TO_ASYMMETRIC, TO_EXPONENT, TO_MANTISSA, TO_BITS,
        STOCHASTIC,
    )  # fmt: skip
    _pack(out_codes, start // TO_PER * TO_BYTES, code, valid, group, TO_PER, TO_BYTES, TO_BITS)
    tl.store(out_scales + k, scale, mask=row < 1)
    if TO_ASYMMETRIC:
        tl.store(out_zeros + k, zero, mask=row < 1)


def constants(form: Format) -> dict[str, Any]:
    """What the kernels know of a format when they are compiled."""
    per, num_bytes = form.group
    return {
        "TOP": float(form.top),
        "ASYMMETRIC": form.asymmetric,
        "EXPONENT": form.exponent,
        "MANTISSA": form.mantissa,
        "BITS": form.bits,
        "PER": per,
        "BYTES": num_bytes,
        "LARGEST": form.largest_code if form.exponent else 0,
    }


def tiling(form: Format, block: int) -> dict[str, int]:
    """R blocks to a program, of G groups of codes."""
    wide = triton.next_power_of_2(block)
    return {"R": max(1, TILE // wide), "G": wide // form.group[0]}


def _launch(
    kernel: Any, rows: int, numel: int, block: int, sizes: dict[str, int], *args: Any, **more: Any
) -> None:
    blocks = rows * triton.cdiv(numel, block)
    warps = 4 if block <= 4 * TILE else 16
    kernel[(triton.cdiv(blocks, sizes["R"]),)](
        *args, **sizes, **more, num_warps=warps, enable_fp_fusion=False
    )


def pointers(parts: Parts) -> tuple[Tensor, ...]:
    """Codes, scales and zeros; scales again for zeros that are not there and not read."""
    return (parts.codes, parts.scales, parts.scales if parts.zeros is None else parts.zeros)


def strides(*tensors: Tensor) -> list[int]:
    """Elements from row to row."""
    return [tensor.stride(0) for tensor in tensors]


def quantize(x: Tensor, parts: Parts, form: Format, block: int, how: Rounding) -> None:
    """Quantise rows."""
    given = (x, *pointers(parts))
    with torch.cuda.device_of(x):
        _launch(
            quantize_kernel, *x.shape, block, tiling(form, block),
            *given, *strides(*given), *x.shape, block, how.seed, how.first_block,
            **constants(form), STOCHASTIC=how.stochastic,
        )  # fmt: skip


def dequantize(parts: Parts, out: Tensor, form: Format, block: int, add: bool) -> None:
    """Dequantise rows, or add them to `out`."""
    given = (*pointers(parts), out)
    with torch.cuda.device_of(out):
        _launch(
            dequantize_kernel, *out.shape, block, tiling(form, block),
            *given, *strides(*given), *out.shape, block, **constants(form), ADD=add,
        )  # fmt: skip


def sum_chunks(parts: Parts, out: Tensor, form: Format, block: int, factor: float) -> None:
    """Sum rows."""
    given, numel = pointers(parts), out.shape[1]
    with torch.cuda.device_of(out):
        _launch(
            sum_kernel, 1, numel, block, tiling(form, block),
            *given, out, *strides(*given), parts.codes.shape[0], numel, block, factor, **constants(form),
        )  # fmt: skip


def requantize(parts: Parts, out: Parts, numel: int, how: Any) -> None:
    """Sum rows and quantise the sum."""
    given, to = pointers(parts), {f"TO_{name}": value for name, value in constants(how.out_form).items()}
    with torch.cuda.device_of(parts.codes):
        _launch(
            requantize_kernel, 1, numel, how.block, tiling(how.form, how.block),
            *given, *pointers(out), *strides(*given), parts.codes.shape[0], numel, how.block,
            how.rounding.seed, how.rounding.first_block, how.factor,
            **constants(how.form), **to, STOCHASTIC=how.rounding.stochastic,
        )  # fmt: skip


def _variants() -> list[Variant]:
    steps = [f"{name}_stride" for name in ("x", "codes", "scales", "zeros", "out")]
    whole = dict.fromkeys((*steps, "rows", "numel", "block", "seed", "first_block", "chunks"), "i64")
    whole["factor"] = "fp32"
    made = []
    for name, form in FORMATS.items():
        fixed = {**constants(form), **tiling(form, 256)}
        whole["seed"] = "i32" if name == "uint4" else "i64"  # as launches have it
        for dtype in ("fp32", "bf16", "fp16") if name == "int8" else ("bf16",):
            types = {
                "x": f"*{dtype}",
                "out": f"*{dtype}",
                "codes": "*u8",
                "scales": "*fp32",
                "zeros": "*fp32",
            }
            rounding = {"STOCHASTIC": not form.exponent}
            made.append(Variant(quantize_kernel, {**whole, **types}, {**fixed, **rounding}))
            made.append(Variant(dequantize_kernel, {**whole, **types}, {**fixed, "ADD": False}))
        types |= {"out_codes": "*u8", "out_scales": "*fp32", "out_zeros": "*fp32"}
        if name in ("int8", "int4"):  # what collectives send
            to = {f"TO_{key}": value for key, value in constants(FORMATS["int8"]).items()}
            made.append(Variant(sum_kernel, {**whole, **types}, fixed))
            made.append(Variant(requantize_kernel, {**whole, **types}, {**fixed, **to, "STOCHASTIC": True}))
    return made


VARIANTS = _variants()
