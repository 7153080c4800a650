"""One bit an element: its sign, and one magnitude for many."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ds_comm.wire_rows import NonFinite, RowCodec, padded, rounded_bound
from ds_kernels.ops.bits import Signs, pack_signs_, unpack_signs


class OneBit(RowCodec):
    """Signs, and the mean magnitude of each block (None: of each chunk), as 1-bit Adam sends momentum.

    A row on the wire: scales fp32 [blocks], then 1 bit an element, up to a word. sign(0) is 1. The error of
    an element is how far its magnitude is from the mean, so it is of use only where what is lost is kept and
    sent later: `ErrorFeedback(OneBit())`. `norm` "l2" takes the root of the mean square instead. Paper: Tang
    et al., "1-bit Adam", 2021, algorithm 1.
    """

    name = "onebit"

    def __init__(
        self,
        *,
        block: int | None = None,
        norm: Literal["l1", "l2"] = "l1",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(nonfinite)
        if block is not None and (block < 16 or block % 16):
            raise ValueError(f"block={block!r}; allowed: None (a chunk) or a positive multiple of 16")
        if norm not in ("l1", "l2"):
            raise ValueError(f"norm={norm!r}; allowed: 'l1' or 'l2'")
        self.block, self.norm = block, norm

    def settings(self) -> dict[str, Any]:
        return {"block": self.block, "norm": self.norm}

    def _each(self, numel: int) -> int:
        """Elements of a block."""
        return -(-max(numel, 1) // 16) * 16 if self.block is None else self.block

    def _num_blocks(self, numel: int) -> int:
        return -(-numel // self._each(numel))

    def wire_bytes(self, numel: int) -> int:
        return 4 * self._num_blocks(numel) + padded(-(-numel // 8))

    def error_bound(self, src: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., n] fp64: how far each magnitude is from its block's, and 2^-22 of that for rounding it."""
        n = src.shape[-1]
        if not src.numel():
            return src.double()
        wide, each, scales = src.double(), self._each(n), []
        for block in torch.split(wide, each, -1):
            power = 1 if self.norm == "l1" else 2
            mean = block.abs().pow(power).mean(-1, keepdim=True) ** (1 / power)
            scales.append(mean.expand_as(block))
        scale = torch.cat(scales, -1)
        bound = (wide.abs() - scale).abs() + scale * 2.0**-22
        return rounded_bound(bound, src, dtype or src.dtype)

    def _scales(self, wire: Tensor, numel: int) -> Tensor:
        return wire[:, : 4 * self._num_blocks(numel)].view(torch.float32)

    def _signs(self, wire: Tensor, numel: int) -> Signs:
        scales = self._scales(wire, numel)
        at = 4 * self._num_blocks(numel)
        signs = wire[:, at : at + -(-numel // 8)]
        return Signs(signs, scales, torch.Size((wire.shape[0], numel)), torch.float32, self._each(numel))

    def _encode(self, src: Tensor, wire: Tensor) -> None:
        pack_signs_(src, norm=self.norm, out=self._signs(wire, src.shape[1]))

    def _decode(self, wire: Tensor, out: Tensor, accumulate: bool) -> None:
        n = out.shape[1]
        for row, values in zip(wire, out, strict=True):
            unpack_signs(self._signs(row[None], n), out=values, accumulate=accumulate)

    def _sum(self, wire: Tensor, out: Tensor, scale: float) -> None:
        unpack_signs(self._signs(wire, out.numel()), factor=scale, out=out)
