"""Int8, int4 and fp8 with a scale for each block, as ZeRO++ sends weights and gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ds_comm.wire_rows import NonFinite, RowCodec, blocks_of, padded, rounded_bound
from ds_kernels.ops.quant import Blocks, FormatName, dequantize_blocks, quantize_blocks
from ds_kernels.ops.quant_formats import FLOOR, FORMATS
from ds_kernels.ops.quant_reduce import requantize_blocks, sum_blocks

Rounding = Literal["nearest", "stochastic"]
_RANK_SHIFT = 48  # blocks that one rank may draw for, before it meets the next one's chances


class BlockCodec(RowCodec):
    """A row on the wire: scales fp32 [blocks], zeros fp32 [blocks] (asymmetric), codes, up to a word.

    [Note: the block] The largest value of a block sets the step, and a scale costs 32 / block bits an
    element. Of 64, 256 and 1024 normal values the largest is 2.60, 3.05 and 3.44 deviations on average.
    Counted in bits (log2 of that, and the scale's) they come to 1.88, 1.73 and 1.82: 256 is the cheapest
    power of two, for int4 as for int8, and heavier tails make large blocks only worse.
    """

    def __init__(
        self,
        format: FormatName,
        *,
        block: int,
        rounding: Rounding = "nearest",
        seed: int = 0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(nonfinite)
        if block < 16 or block % 16:
            raise ValueError(f"block={block!r}; allowed: a positive multiple of 16, best of 64")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding={rounding!r}; allowed: 'nearest' or 'stochastic'")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed!r}; allowed: from 0 to 2^63 - 1")
        self.format: FormatName = format
        self.block, self.rounding, self.seed = block, rounding, seed
        self._form = FORMATS[format]
        self._drawn = 0  # blocks that chances were drawn for
        self._rank = 0

    def settings(self) -> dict[str, Any]:
        seed = self.seed if self.rounding == "stochastic" else None
        return {"format": self.format, "block": self.block, "rounding": self.rounding, "seed": seed}

    def wire_bytes(self, numel: int) -> int:
        return self._codes_at(numel) + padded(self._form.num_bytes(numel))

    def _codes_at(self, numel: int) -> int:
        return 4 * -(-numel // self.block) * (2 if self._form.asymmetric else 1)

    def error_bound(self, src: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., n] fp64, of finite values: an integer is half a step off (by chance: a step) and 2^-21 of the
        block's largest; a float half a step of its mantissa, or of its subnormals. All are rounded to
        `dtype`.
        """
        if not src.numel():
            return src.double()
        form, blocks = self._form, blocks_of(src, self.block)
        size = blocks.abs().amax(-1, keepdim=True)
        reach = blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True) if form.asymmetric else size
        step = (reach / form.top).clamp_min(FLOOR)
        if form.exponent:
            bias = 2 ** (form.exponent - 1) - 1
            half = (blocks.abs() * 2.0 ** -(form.mantissa + 1)).clamp_min(
                step * 2.0 ** (-bias - form.mantissa)
            )
            bound = half + blocks.abs() * 2.0**-22
        else:
            share = 1.0 if self.rounding == "stochastic" else 0.5
            bound = (step * share + size * 2.0**-21).expand_as(blocks)
        bound = torch.where(size == 0, 0.0, bound)
        bound = bound.flatten(-2)[..., : src.shape[-1]].contiguous()
        return rounded_bound(bound, src, dtype or src.dtype)

    def recode(self, wire: Tensor, numel: int, to: RowCodec, out: Tensor) -> bool:
        """The sum of [k, wire_bytes(numel)] as a row [1, bytes] of `to`, in one pass; False if it cannot be.

        Marks go on as marks.
        """
        if not isinstance(to, BlockCodec) or to.block != self.block or not numel:
            return False
        requantize_blocks(self._blocks(wire, numel), out=to._row(out, numel), **to._chances(1, numel))
        return True

    def at_rank(self, rank: int) -> BlockCodec:
        mine = copy.copy(self)
        mine._rank = rank
        return mine

    def state_dict(self) -> dict[str, Any]:
        """How far chances are drawn; the same on every rank."""
        return {} if self.rounding == "nearest" else {"seed": self.seed, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wanted = self.state_dict().keys()
        if state.keys() != wanted:
            raise ValueError(f"the state of {self!r} is {sorted(wanted)}, got {sorted(state)}")
        if state:
            self.seed, self._drawn = int(state["seed"]), int(state["drawn"])

    def _scales(self, wire: Tensor, numel: int) -> Tensor:
        return wire[:, : 4 * -(-numel // self.block)].view(torch.float32)

    def _blocks(self, wire: Tensor, numel: int) -> Blocks:
        blocks, at = -(-numel // self.block), self._codes_at(numel)
        zeros = wire[:, 4 * blocks : at].view(torch.float32) if self._form.asymmetric else None
        codes = wire[:, at : at + self._form.num_bytes(numel)]
        shape, scales = torch.Size((wire.shape[0], numel)), self._scales(wire, numel)
        return Blocks(codes, scales, zeros, shape, torch.float32, self.format, self.block)

    def _row(self, wire: Tensor, numel: int) -> Blocks:
        """Of a wire [1, bytes]: a shape of one dimension."""
        found = self._blocks(wire, numel)
        zeros = None if found.zeros is None else found.zeros[0]
        shape = torch.Size((numel,))
        return Blocks(found.codes[0], found.scales[0], zeros, shape, found.dtype, self.format, self.block)

    def _chances(self, rows: int, numel: int) -> dict[str, Any]:
        """How to round the next rows. No block of a run meets the chances of another one."""
        if self.rounding == "nearest":
            return {}
        first = (self._rank << _RANK_SHIFT) + self._drawn
        self._drawn += rows * -(-numel // self.block)
        return {"rounding": "stochastic", "seed": self.seed, "first_block": first}

    def _encode(self, src: Tensor, wire: Tensor) -> None:
        made, rows = self._blocks(wire, src.shape[1]), src.shape[0]
        quantize_blocks(
            src, format=self.format, block=self.block, out=made, **self._chances(rows, src.shape[1])
        )

    def _decode(self, wire: Tensor, out: Tensor, accumulate: bool) -> None:
        dequantize_blocks(self._blocks(wire, out.shape[1]), out=out, accumulate=accumulate)

    def _sum(self, wire: Tensor, out: Tensor, scale: float) -> None:
        sum_blocks(self._blocks(wire, out.numel()), factor=scale, out=out)


class Int8(BlockCodec):
    """8 bits an element and a scale (asymmetric: and a least value) for each block: ZeRO++'s qwZ.

    Symmetric codes are multiples of max|x| / 127 from -127 to 127; asymmetric ones cut [min, max] into 255.
    Stochastic rounding is unbiased, with twice the worst error; its chances follow from `seed`, the rank and
    how many blocks went before, and are part of checkpoints. See [Note: the block] for 256.
    """

    name = "int8"

    def __init__(
        self,
        *,
        block: int = 256,
        symmetric: bool = True,
        rounding: Rounding = "nearest",
        seed: int = 0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        format: FormatName = "int8" if symmetric else "uint8"
        super().__init__(format, block=block, rounding=rounding, seed=seed, nonfinite=nonfinite)


class Int4(BlockCodec):
    """4 bits an element and a scale (asymmetric: and a least value) for each block: ZeRO++'s qgZ.

    As Int8, with codes from -7 to 7, or 15 steps from min to max.
    """

    name = "int4"

    def __init__(
        self,
        *,
        block: int = 256,
        symmetric: bool = True,
        rounding: Rounding = "nearest",
        seed: int = 0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        format: FormatName = "int4" if symmetric else "uint4"
        super().__init__(format, block=block, rounding=rounding, seed=seed, nonfinite=nonfinite)


class Fp8(BlockCodec):
    """8 bits an element as torch's float8 codes, and a scale that brings each block's largest to the top.

    e4m3: relative error 2^-4 down to 2^-15 of the block's largest, which suits values of many sizes; e5m2:
    2^-3, down to 2^-31. Where a block's values are of one size, Int8 is closer at the same bytes.
    """

    name = "fp8"

    def __init__(
        self,
        format: Literal["e4m3", "e5m2"] = "e4m3",
        *,
        block: int = 256,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if format not in ("e4m3", "e5m2"):
            raise ValueError(f"format={format!r}; allowed: 'e4m3' or 'e5m2'")
        super().__init__(format, block=block, nonfinite=nonfinite)
