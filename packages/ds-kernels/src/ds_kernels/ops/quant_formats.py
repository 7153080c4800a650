"""The number formats that blocks are quantised to, and their arithmetic in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A scale is never below the smallest normal number, so that its reciprocal is finite; a block whose magnitude
# (asymmetric: range) is not below LIMIT, or is NaN, decodes to NaN: beyond, products could overflow.
FLOOR, LIMIT = 2.0**-126, 2.0**127
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Format:
    """How a value divided by its block's scale is kept: an integer, or a float of few bits."""

    code: int  # its number in sources/quant/quant.h
    bits: int
    top: int  # the largest value; an asymmetric integer starts at 0, others at -top
    asymmetric: bool = False
    exponent: int = 0  # bits, of a float
    mantissa: int = 0
    storage: torch.dtype = torch.uint8  # besides uint8, what codes may be kept in

    @property
    def group(self) -> tuple[int, int]:
        """(codes, bytes) that are packed together, lowest bits first."""
        return {8: (1, 1), 4: (2, 1), 6: (4, 3), 12: (2, 3)}[self.bits]

    def num_bytes(self, numel: int) -> int:
        """Bytes of `numel` packed codes."""
        codes, num_bytes = self.group
        return -(-numel // codes) * num_bytes

    @property
    def largest_code(self) -> int:
        """Of a float: the magnitude bits of `top`; what lies above is never written, and read as NaN."""
        bias = (1 << (self.exponent - 1)) - 1
        power = math.floor(math.log2(self.top))
        return ((power + bias) << self.mantissa) + int((self.top / (1 << power) - 1) * (1 << self.mantissa))


FORMATS: Mapping[str, Format] = {
    "int8": Format(0, 8, 127, storage=torch.int8),
    "uint8": Format(1, 8, 255, asymmetric=True),
    "int4": Format(2, 4, 7),
    "uint4": Format(3, 4, 15, asymmetric=True),
    "e4m3": Format(4, 8, 448, exponent=4, mantissa=3, storage=torch.float8_e4m3fn),
    "e5m2": Format(5, 8, 57344, exponent=5, mantissa=2, storage=torch.float8_e5m2),
    "e3m2": Format(6, 6, 28, exponent=3, mantissa=2),
    "e4m7": Format(7, 12, 510, exponent=4, mantissa=7),
}


@dataclass(frozen=True)
class Rounding:
    """To nearest even, or up or down at random by `seed` and the number of the block and the element."""

    stochastic: bool = False
    seed: int = 0
    first_block: int = 0


def encode(values: Tensor, form: Format, block: int, how: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, n] -> packed codes [rows, bytes], scales and zeros [rows, blocks]."""
    rows, numel = values.shape
    blocks = -(-numel // block)
    if not rows * numel:
        empty = values.new_zeros((rows, blocks), dtype=torch.float32)
        return values.new_zeros((rows, form.num_bytes(numel)), dtype=torch.uint8), empty, empty
    wide = values.to(torch.float32)
    filler = wide[:, -1:].expand(rows, blocks * block - numel)  # changes neither the least nor the largest
    wide = torch.cat([wide, filler], 1).view(rows, blocks, block)
    scales, zeros = _ranges(wide, form)
    scaled = (wide - zeros[..., None]) if form.asymmetric else wide
    scaled = scaled * (1.0 / scales)[..., None]
    codes = _float_codes(scaled, form) if form.exponent else _integer_codes(scaled, form, how)
    codes = torch.where(scales.isnan()[..., None], 0, codes).view(rows, -1)[:, :numel]
    return pack(codes, form), scales, zeros


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, form: Format, block: int, n: int) -> Tensor:
    """[rows, bytes], [rows, blocks] -> fp32 [rows, n]."""
    values = unpack(codes, form, n)
    values = _float_values(values, form) if form.exponent else _integer_values(values, form)
    values = values * scales.repeat_interleave(block, dim=1)[:, :n]
    return values if zeros is None else values + zeros.repeat_interleave(block, dim=1)[:, :n]


def pack(codes: Tensor, form: Format) -> Tensor:
    """Non-negative codes [rows, n] -> bytes, the lowest bits first."""
    per, num_bytes = form.group
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % per))
    codes = codes.view(codes.shape[0], codes.shape[1] // per, per)
    whole = sum((codes[..., i] << (form.bits * i) for i in range(1, per)), codes[..., 0])
    parts = torch.stack([(whole >> (8 * i)) & 255 for i in range(num_bytes)], dim=-1)
    return parts.to(torch.uint8).flatten(1)


def unpack(packed: Tensor, form: Format, numel: int) -> Tensor:
    """The inverse of `pack`, as int32."""
    per, num_bytes = form.group
    parts = packed.to(torch.int32).view(packed.shape[0], packed.shape[1] // num_bytes, num_bytes)
    whole = sum((parts[..., i] << (8 * i) for i in range(1, num_bytes)), parts[..., 0])
    mask = (1 << form.bits) - 1
    codes = torch.stack([(whole >> (form.bits * i)) & mask for i in range(per)], dim=-1)
    return codes.flatten(1)[:, :numel]


def _ranges(wide: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    if form.asymmetric:
        zeros = wide.amin(-1) + 0.0  # no -0
        size = wide.amax(-1) - zeros
    else:
        size = wide.abs().amax(-1)
        zeros = torch.zeros_like(size)
    # A tensor as divisor: torch may multiply by the reciprocal of a number, which rounds twice.
    scales = (size / torch.full_like(size, form.top)).clamp_min(FLOOR)
    fits = size < LIMIT
    return torch.where(fits, scales, float("nan")), torch.where(fits, zeros, float("nan"))


def _integer_codes(scaled: Tensor, form: Format, how: Rounding) -> Tensor:
    if how.stochastic:  # in parts of 2^-16 of a step; a draw of 16 bits is added before these are cut off
        parts = (scaled * 65536.0).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int64)
        codes = ((parts + _draws(scaled, how)) >> 16).clamp(0 if form.asymmetric else -form.top, form.top)
    else:
        codes = scaled.nan_to_num(0.0, 0.0, 0.0).round()
    return codes.to(torch.int32) & ((1 << form.bits) - 1)


def _integer_values(codes: Tensor, form: Format) -> Tensor:
    if not form.asymmetric:
        half = 1 << (form.bits - 1)
        codes = (codes ^ half) - half
    return codes.to(torch.float32)


def _float_codes(scaled: Tensor, form: Format) -> Tensor:
    """Round to nearest even at the mantissa's last bit, subnormals included.

    The scale leaves nothing above `top` but what rounding errors add, which rounds down to it.
    """
    drop, bias = 23 - form.mantissa, 2 ** (form.exponent - 1) - 1
    size = scaled.abs()
    bits = size.view(torch.int32)
    normal = (bits + (2 ** (drop - 1) - 1) + ((bits >> drop) & 1) - ((127 - bias) << 23)) >> drop
    shift = torch.tensor(2.0 ** (1 - bias - form.mantissa + 23), device=size.device)
    subnormal = (size + shift).view(torch.int32) - shift.view(torch.int32)
    codes = torch.where(bits < ((128 - bias) << 23), subnormal, normal)
    return codes | ((scaled.view(torch.int32) < 0) * (1 << (form.bits - 1)))


def _float_values(codes: Tensor, form: Format) -> Tensor:
    drop, bias = 23 - form.mantissa, 2 ** (form.exponent - 1) - 1
    size = codes & ((1 << (form.bits - 1)) - 1)
    normal = ((size << drop) + ((127 - bias) << 23)).view(torch.float32)
    subnormal = size.to(torch.float32) * 2.0 ** (1 - bias - form.mantissa)
    values = torch.where(size < (1 << form.mantissa), subnormal, normal)
    values = torch.where(size > form.largest_code, float("nan"), values)
    return torch.where(codes >> (form.bits - 1) != 0, -values, values)


def _draws(like: Tensor, how: Rounding) -> Tensor:
    """Integers that are uniform over 16 bits, one for each element [rows, blocks, block].

    16 hashes (two rounds of xor-shift-multiply) of seed, block and place serve 64 elements: their lower
    halves, their upper halves, and 40503 = 2^16 / 1.618 times each of both, modulo 2^16.
    """
    rows, blocks, block = like.shape
    number = torch.arange(rows * blocks, device=like.device).view(rows, blocks, 1) + how.first_block
    key = _mix((number >> 32) ^ 0x9E3779B9)
    key = _mix(key ^ (number & _MASK))
    key = _mix(key ^ (how.seed >> 32))
    key = _mix(key ^ (how.seed & _MASK))
    second = _mix(key + 0x9E3779B9)
    place = torch.arange(-(-block // 64) * 16, device=like.device) + key & _MASK
    hashes = _last_product(place, second).reshape(rows, blocks, -1, 16)
    halves = torch.stack([hashes & 0xFFFF, hashes >> 16], dim=-2)
    drawn = torch.stack([halves, halves * 40503 & 0xFFFF], dim=-3)
    return drawn.flatten(-4)[..., :block]


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of the input moves half of the output's."""
    value = _last_product(value, 0)
    return value ^ (value >> 16)


def _last_product(value: Tensor, key: Tensor | int) -> Tensor:
    """The same without its last step, and with `key` entering between its two rounds."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = value ^ key
    return ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
