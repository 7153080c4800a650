"""A unit's [numel] as signs and scales: where each rank's chunk lies, and how it is packed and unpacked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ds_core.state.layout import BucketLayout
from ds_kernels.ops.bits import Signs, pack_signs_, unpack_signs

_SCALE_BYTES = 4


@dataclass(frozen=True)
class MomentumWire:
    """How momenta travel once they are compressed.

    `block`: elements that share a scale, a multiple of 16; None is one scale for each rank's chunk, as in the
    papers. Small blocks follow the momentum's size from layer to layer: with 2048 they cost 1.6 % more bytes.
    `norm`: the scale is |c|_1 / n ("l1": Tang et al. 2021) or |c|_2 / sqrt(n) ("l2": the reference system).
    `preconditioned`: momenta are sent in units of a power of two near the root of their variance, so that the
    size which signs share fits elements with large gradients and with small ones; False sends them as they
    are, as the papers do. 1-bit LAMB scales whole layers instead. Memory: a byte for each element.
    `masks`: parameter, by name or itself, -> [its shape, or what broadcasts to it], 0 where momentum is held
    at zero: rows that never get a gradient, such as positions past the sequences of this phase of training.
    """

    block: int | None = 2048
    norm: Literal["l1", "l2"] = "l1"
    preconditioned: bool = True
    masks: Mapping[str | Tensor, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block is not None and (self.block < 16 or self.block % 16):
            raise ValueError(
                f"block must be a positive multiple of 16, or None for one scale; got {self.block}"
            )
        if self.norm not in ("l1", "l2"):
            raise ValueError(f'norm must be "l1" or "l2", got {self.norm!r}')


def plan_chunks(layout: BucketLayout, world: int) -> BucketLayout:
    """The unit's slots over `world` chunks of whole bytes of signs: its own cut where it has one."""
    each = math.ceil(layout.numel / (8 * world)) * 8
    return BucketLayout(layout.slots, each * world, world)


def gaps(layout: BucketLayout) -> Iterator[slice]:
    """The elements that belong to no parameter."""
    at = 0
    for slot in sorted(layout.slots, key=lambda slot: slot.start):
        if at < slot.start:
            yield slice(at, slot.start)
        at = slot.end
    if at < layout.numel:
        yield slice(at, layout.numel)


@dataclass(frozen=True, slots=True)
class SignRows:
    """Rows of `each` elements as bytes: [scales, 4 bytes for each block | signs, a bit for each element].

    Bytes: 4 * ceil(each / block) + each / 8, up to a multiple of 4.
    """

    each: int
    block: int
    norm: Literal["l1", "l2"]

    @classmethod
    def of(cls, each: int, wire: MomentumWire) -> SignRows:
        row = math.ceil(each / 16) * 16
        return cls(each, row if wire.block is None else min(wire.block, row), wire.norm)

    @property
    def scales_bytes(self) -> int:
        return _SCALE_BYTES * math.ceil(self.each / self.block)

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return self.scales_bytes + math.ceil(self.each / 32) * 4

    def scales(self, wire: Tensor) -> Tensor:
        """[rows, blocks] fp32 of a wire [rows * width]."""
        return wire.view(-1, self.width)[:, : self.scales_bytes].view(torch.float32)

    def pack_(self, values: Tensor, error: Tensor, wire: Tensor) -> None:
        """values [rows * each] fp32 + error, like it, to wire [rows * width]; `error` becomes the loss."""
        rows = values.view(-1, self.each)
        pack_signs_(rows, error.view_as(rows), norm=self.norm, out=self._signs(wire))

    def sum(self, wire: Tensor, out: Tensor, *, factor: float = 1.0) -> Tensor:
        """out [each] fp32 <- factor * the sum of all rows, in their order."""
        return unpack_signs(self._signs(wire), factor=factor, out=out)

    def unpack(self, wire: Tensor, out: Tensor) -> Tensor:
        """out [rows * each] fp32 <- every row by itself."""
        for row, values in zip(wire.view(-1, self.width), out.view(-1, self.each), strict=True):
            self.sum(row, values)
        return out

    def _signs(self, wire: Tensor) -> Signs:
        rows = wire.view(-1, self.width)
        signs = rows[:, self.scales_bytes : self.scales_bytes + self.each // 8]
        return Signs(signs, self.scales(wire), torch.Size((len(rows), self.each)), torch.float32, self.block)
