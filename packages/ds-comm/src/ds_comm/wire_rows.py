"""What our codecs share: rows of a wire, marks of what cannot be encoded, sums of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ds_core.ground.wire import Codec

NonFinite = Literal["raise", "mark"]
_WORD = 4  # bytes; every row of a wire is a multiple of it, so that scales are aligned in each


class NotFiniteError(ValueError):
    """What was encoded held a NaN, an infinity, or a magnitude beyond what a scale can hold."""


def padded(nbytes: int) -> int:
    """Bytes of a column, up to a whole word."""
    return -(-nbytes // _WORD) * _WORD


def aligned(wire: Tensor) -> bool:
    """Can the rows [rows, bytes] uint8 be seen as words? Then they need no copy."""
    return (
        wire.stride(1) == 1
        and wire.stride(0) % _WORD == 0
        and wire.storage_offset() % _WORD == 0
        and (wire.device.type == "meta" or wire.data_ptr() % _WORD == 0)
    )


def check_rows(name: str, values: Tensor, wire: Tensor, width: int) -> None:
    """Raises ValueError unless `values` [rows, n] and `wire` [rows, width] uint8 belong together."""
    fits = values.dim() == wire.dim() == 2 and wire.shape == (values.shape[0], width)
    if not fits or wire.dtype != torch.uint8:
        raise ValueError(
            f"{name} puts [rows, n] on a wire [rows, wire_bytes(n)] of uint8; given {tuple(values.shape)} "
            f"and {tuple(wire.shape)} of {wire.dtype}, where wire_bytes is {width}"
        )


def mark_all(scales: Tensor) -> None:
    """Where one scale of [rows, blocks] is not finite, the first one of every row becomes NaN.

    Each row goes to another rank: all of them are to know. Without looking, so without a wait for a device.
    """
    if scales.numel():
        bad = ~torch.isfinite(scales).all()
        scales[:, 0] = torch.where(bad, torch.nan, scales[:, 0])


def refuse_marks(name: str, scales: Tensor) -> None:
    """Raises NotFiniteError naming the rows that carry a mark. Waits for the device."""
    fine = torch.isfinite(scales).all(1)
    if not bool(fine.all()):
        rows = (~fine).nonzero().flatten().tolist()
        raise NotFiniteError(
            f"{name} was given a value that is not finite (a NaN, an infinity, or 2^127 and above), which it "
            f"never encodes; chunks {rows} of {len(fine)} say so. A codec with nonfinite='mark' hands on NaN "
            "instead, as a loss scaler needs"
        )


def rounded_bound(bound: Tensor, src: Tensor, dtype: torch.dtype) -> Tensor:
    """A bound on values in fp32, and what rounding them to `dtype` adds: half a step of its mantissa."""
    if dtype.itemsize > 2:
        return bound
    mantissa, least = {torch.bfloat16: (8, 2.0**-134), torch.float16: (11, 2.0**-25)}[dtype]
    return bound + ((src.double().abs() + bound) * 2.0**-mantissa).clamp_min(least)


def blocks_of(src: Tensor, block: int) -> Tensor:
    """[..., n] -> fp64 [..., blocks, block], the last block filled up with its last value."""
    wide = src.double()
    blocks = -(-wide.shape[-1] // block)
    filler = wide[..., -1:].expand(*wide.shape[:-1], blocks * block - wide.shape[-1])
    return torch.cat([wide, filler], -1).view(*wide.shape[:-1], blocks, block)


def sum_rows(
    codec: Codec, wire: Tensor, out: Tensor, *, scale: float = 1.0, accumulate: bool = False
) -> None:
    """[k, wire bytes] -> [n]: `scale` times the sum of the rows in fp32, in order; added to `out` if told so.

    Ours do it in one pass, and pass marks on as NaN; another codec decodes row by row.
    """
    if isinstance(codec, RowCodec):
        codec.sum(wire, out, scale=scale, accumulate=accumulate)
        return
    total = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for row in wire:
        codec.decode(row.view(1, -1), total.view(1, -1), accumulate=True)
    put(out, total, scale=scale, accumulate=accumulate)


def put(out: Tensor, total: Tensor, *, scale: float, accumulate: bool) -> None:
    """out (+)= scale * total, rounded once to `out`'s dtype."""
    total = total if scale == 1.0 else total.mul_(scale)
    if not accumulate:
        out.copy_(total)
    elif out.dtype == total.dtype:
        out.add_(total)
    else:
        out.copy_(total.add_(out))


class RowCodec:
    """A codec whose rows begin with scales: what `Int8`, `Int4`, `Fp8` and `OneBit` are to routes.

    Subclasses say the columns of a row, and the arithmetic; this class marks, refuses, and remembers nothing.
    """

    name = ""

    def __init__(self, nonfinite: NonFinite) -> None:
        if nonfinite not in ("raise", "mark"):
            raise ValueError(f"nonfinite={nonfinite!r}; allowed: 'raise' or 'mark'")
        self.nonfinite: NonFinite = nonfinite

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on, as JSON."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.settings().items() if value is not None)
        return f"{type(self).__name__}({shown})"

    def wire_bytes(self, numel: int) -> int:
        """Exactly; always a multiple of 4."""
        raise NotImplementedError

    def error_bound(self, src: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., n] fp64: how far each decoded value may be from `src`; `dtype`: what it is decoded into."""
        raise NotImplementedError

    def encode(self, src: Tensor, wire: Tensor) -> None:
        """[rows, n] -> [rows, wire_bytes(n)]. What is not finite raises nothing here: every row is marked."""
        n = src.shape[-1]
        check_rows(self.name, src, wire, self.wire_bytes(n))
        if not wire.numel():
            return
        room = wire if aligned(wire) else wire.new_empty(wire.shape)
        room[:, -_WORD:] = 0  # what no code fills
        self._encode(src, room)
        self.mark(room, n)
        if room is not wire:
            wire.copy_(room)

    def decode(self, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """[rows, wire_bytes(n)] -> [rows, n], computed in fp32 and rounded once.

        Raises NotFiniteError (a ValueError) where a row carries a mark, unless the codec is told to pass NaN.
        """
        self._read(wire, out, accumulate, refuse=True)

    def read(self, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """`decode`, where marks always give NaN: for who has looked at them, or is not to be the only one."""
        self._read(wire, out, accumulate, refuse=False)

    def _read(self, wire: Tensor, out: Tensor, accumulate: bool, *, refuse: bool) -> None:
        n = out.shape[-1]
        check_rows(self.name, out, wire, self.wire_bytes(n))
        if not wire.numel():
            return
        wire = wire if aligned(wire) else wire.new_empty(wire.shape).copy_(wire)
        if refuse:
            self.refuse(wire, n)
        self._decode(wire, out, accumulate)

    def sum(self, wire: Tensor, out: Tensor, *, scale: float = 1.0, accumulate: bool = False) -> None:
        """[k, wire_bytes(n)] -> [n]: `scale` times the sum of rows, in order and in fp32; marks give NaN."""
        if not out.numel():
            return
        if not accumulate:
            self._sum(wire, out, scale)
            return
        total = torch.empty(out.numel(), dtype=torch.float32, device=out.device)
        self._sum(wire, total, scale)
        put(out, total, scale=1.0, accumulate=True)

    def mark(self, wire: Tensor, numel: int) -> None:
        """If a row of [rows, wire_bytes(numel)] carries a mark, all do."""
        if numel:
            mark_all(self._scales(wire, numel))

    def refuse(self, wire: Tensor, numel: int) -> None:
        """Raises NotFiniteError where a row carries a mark, if that is this codec's policy."""
        if numel and self.nonfinite == "raise":
            refuse_marks(self.name, self._scales(wire, numel))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{self!r} has no state, got {sorted(state)}")

    def at_rank(self, rank: int) -> RowCodec:
        """The same codec with state of its own, and with this rank's chances where it rounds by chance."""
        return self

    # -- what a subclass computes ------------------------------------------------------------------------

    def _scales(self, wire: Tensor, numel: int) -> Tensor:
        """[rows, blocks] fp32, a view of the first column."""
        raise NotImplementedError

    def _encode(self, src: Tensor, wire: Tensor) -> None:
        raise NotImplementedError

    def _decode(self, wire: Tensor, out: Tensor, accumulate: bool) -> None:
        raise NotImplementedError

    def _sum(self, wire: Tensor, out: Tensor, scale: float) -> None:
        raise NotImplementedError
