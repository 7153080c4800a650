"""Weights of a linear layer in 8, 6 or 4 bits with fp32 scales: packing, unpacking, and which tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_kernels import check

Bits = Literal[8, 6, 4]
CHUNK = 32  # input channels; a group of scales is a multiple of it
BLOCKS = {8: 1, 6: 256, 4: 128}  # input channels that are packed together
DEFAULT_GROUP = {8: 0, 6: 0, 4: 128}
LARGEST = {8: 127.0, 6: 28.0, 4: 7.0}  # the largest code, symmetric
ZERO = 8  # the 4-bit code of zero without zero points


@dataclass(frozen=True)
class PackedLinear:
    """A weight [out, in] as codes and scales; plain tensors, the same on every device and processor.

    weight[n, k] = (value(codes)[n, k] - zeros[n, g]) * scales[n, g], with g = k // group, 0 without groups.
    codes: int8 [out, in] for 8 bits, -127..127 (-128 is no code: some implementations read 0); else uint8
    [out, bytes] in blocks (kernels/linear/linear.h).
    scales: fp32 [out, groups]. zeros: uint8 [out, groups], 0..15, of 4 bits only; None is 8 everywhere.
    """

    bits: Bits
    in_features: int
    group: int  # 0: one scale per output channel
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)


def groups_of(in_features: int, group: int) -> int:
    """How many scales a row has."""
    return -(-in_features // group) if group else 1


def code_shape(bits: Bits, in_features: int) -> tuple[torch.dtype, int]:
    """Element type and row length of the codes."""
    if bits == 8:
        return torch.int8, in_features
    padded = -(-in_features // BLOCKS[bits]) * BLOCKS[bits]
    return torch.uint8, padded * bits // 8


@torch.no_grad()
def pack_linear(
    weight: Tensor, bits: Bits = 8, *, group: int | None = None, symmetric: bool = True
) -> PackedLinear:
    """Round a weight [out, in] to the nearest codes: int8 or int4 steps, or fp6 (e3m2: 1 sign, 3, 2 bits).

    The scale makes a group's largest magnitude the largest code; asymmetric int4 spans minimum to maximum.
    group: input channels to a scale, a multiple of 32, 0 for whole rows (default: 128 for 4 bits, else 0).
    Raises: ValueError for weights that are not finite or not 2-D, other bits or groups.
    """
    if bits not in BLOCKS:
        raise ValueError(f"pack_linear: bits={bits} is not allowed: it must be 8, 6 or 4")
    group = DEFAULT_GROUP[bits] if group is None else group
    check_group("pack_linear", group)
    check.tensor("pack_linear", "weight", weight, shape=(None, None))
    if not weight.is_floating_point() or not weight.numel():
        check.refuse("pack_linear", "weight", weight, "a floating-point dtype and at least one element")
    if not symmetric and bits != 4:
        raise ValueError(f"pack_linear: symmetric=False is for 4 bits, not {bits}")
    columns = weight.shape[1]
    width = group or columns
    count = groups_of(columns, group)
    w = F.pad(weight.float(), (0, count * width - columns)).view(-1, count, width)
    if not bool(w.isfinite().all()):
        raise ValueError("pack_linear: weight has infinite or NaN elements; pack a finite one")
    tiny = torch.finfo(torch.float32).tiny
    zeros = None
    if symmetric:
        scales = (w.abs().amax(2) / LARGEST[bits]).clamp_min(tiny)
        scaled = w / scales[..., None]
    else:
        low, high = w.amin(2).clamp_max(0), w.amax(2).clamp_min(0)
        scales = ((high - low) / 15).clamp_min(tiny)
        zeros = (-low / scales).round().clamp(0, 15)
        scaled = w / scales[..., None] + zeros[..., None]
        zeros = zeros.to(torch.uint8)
    flat = scaled.flatten(1)[:, :columns]
    return PackedLinear(bits, columns, group, _encode(flat, bits, symmetric), scales.contiguous(), zeros)


def check_group(op: str, group: int) -> None:
    """Raise ValueError unless this is a number of input channels to a scale."""
    check.number(op, "group", group, f"0 or a multiple of {CHUNK}", group >= 0 and group % CHUNK == 0)


def _encode(scaled: Tensor, bits: Bits, symmetric: bool) -> Tensor:
    if bits == 8:
        return scaled.round().clamp(-127, 127).to(torch.int8)
    if bits == 6:
        return _to_bytes(_nearest_fp6(scaled), bits)
    codes = scaled.round().clamp(-7, 7) + ZERO if symmetric else scaled.round().clamp(0, 15)
    return _to_bytes(codes.to(torch.int32), bits)


def fp6_values() -> Tensor:
    """The 64 numbers of e3m2 (bias 3, subnormals, no infinities), by code."""
    codes = torch.arange(32)
    exponent, mantissa = codes >> 2, codes & 3
    sixteenths = torch.where(exponent > 0, (4 + mantissa) << (exponent - 1).clamp_min(0), mantissa)
    values = sixteenths.float() / 16
    return torch.cat([values, -values])


@cache
def _fp6_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    return fp6_values().to(device, dtype)


def _nearest_fp6(scaled: Tensor) -> Tensor:
    """Codes, ties to the even mantissa: codes of neighbours differ by one, so the even code."""
    grid = fp6_values()[:32].to(scaled.device)
    magnitude = scaled.abs().clamp_max(28.0).contiguous()
    above = torch.searchsorted(grid, magnitude).clamp(1, 31)
    below = above - 1
    down, up = magnitude - grid[below], grid[above] - magnitude
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_up, above, below) + 32 * (scaled < 0)


def _to_bytes(codes: Tensor, bits: Bits) -> Tensor:
    """Codes [n, k] to bytes in blocks, as linear.h says."""
    block = BLOCKS[bits]
    fill = ZERO if bits == 4 else 0
    padded = F.pad(codes.to(torch.int32), (0, -codes.shape[1] % block), value=fill)
    c = padded.view(codes.shape[0], -1, block // CHUNK, CHUNK).unbind(2)
    if bits == 4:
        words = (c[0] | c[1] << 4 | c[2] << 8 | c[3] << 12)[:, :, None]
    else:
        first = c[0] | c[1] << 6 | (c[6] & 15) << 12
        second = c[2] | c[3] << 6 | (c[6] >> 4) << 12 | (c[7] & 3) << 14
        third = c[4] | c[5] << 6 | (c[7] >> 2) << 12
        words = torch.stack([first, second, third], 2)
    halves = torch.stack([words & 255, words >> 8], -1)
    return halves.to(torch.uint8).flatten(1).contiguous()


def _from_bytes(codes: Tensor, bits: Bits) -> Tensor:
    """The inverse of _to_bytes, padding included: int32 [n, padded k]."""
    words_each = BLOCKS[bits] * bits // 16
    halves = codes.to(torch.int32).reshape(
        codes.shape[0], codes.shape[1] // (2 * words_each), words_each // CHUNK, CHUNK, 2
    )
    words = halves[..., 0] | halves[..., 1] << 8
    if bits == 4:
        parts = [words[:, :, 0] >> shift & 15 for shift in (0, 4, 8, 12)]
    else:
        parts = [words[:, :, i] >> shift & 63 for i in range(3) for shift in (0, 6)]
        first, second, third = (words[:, :, i] >> 12 for i in range(3))
        parts += [first | (second & 3) << 4, second >> 2 | third << 2]
    return torch.stack(parts, 2).flatten(1)


def unpack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: Bits,
    group: int,
    columns: int,
    wide: torch.dtype,
) -> Tensor:
    """The weight [out, columns] in `wide` (fp32 or float64), in plain torch on any device."""
    if bits == 8:
        values = codes.to(wide)
    elif bits == 4:
        values = _from_bytes(codes, bits)[:, :columns].to(wide)
        values = values - (ZERO if zeros is None else _spread(zeros.to(wide), group, columns))
    else:
        values = _fp6_on(codes.device, wide)[_from_bytes(codes, bits)[:, :columns]]
    return values * _spread(scales.to(wide), group, columns)


def _spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    return per_group.repeat_interleave(group, 1)[:, :columns] if group else per_group
