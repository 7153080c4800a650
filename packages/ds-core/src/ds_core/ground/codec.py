"""Casts as a wire format, and collectives through any codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_core.ground.listener import Coding
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec, Communicator


class CastCodec:
    """fp32 <-> bf16 or fp16 is a wire format too: each value is rounded to the nearest one of `dtype`.

    Error bound: relative 2**-9 (bf16) or 2**-12 (fp16) of the value, where it is in range.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"CastCodec needs a floating point dtype, got {dtype}; integers need a scale")
        self.dtype = dtype

    def wire_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def error_bound(self, src: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., n] fp64: how far each decoded value may be from `src`; `dtype`: what it is decoded into."""
        bound, size = torch.zeros_like(src, dtype=torch.float64), src.double().abs()
        for to in (self.dtype, dtype or src.dtype):
            info = torch.finfo(to)
            bound += ((size + bound) * (info.eps / 2)).clamp_min(info.smallest_normal * info.eps / 2)
        return bound if {self.dtype, dtype or src.dtype} != {src.dtype} else bound.zero_()

    def encode(self, src: Tensor, wire: Tensor) -> None:
        """[chunks, n] -> [chunks, n * itemsize] uint8."""
        if not wire.numel():
            return
        if self._fits(wire):
            wire.view(self.dtype).copy_(src)
        else:
            wire.copy_(src.to(self.dtype).contiguous().view(torch.uint8))

    def _fits(self, wire: Tensor) -> bool:
        """Can these bytes be seen as the wire's dtype where they are?"""
        places = (wire.storage_offset(), wire.stride(0))
        return wire.stride(1) == 1 and not any(place % self.dtype.itemsize for place in places)

    def decode(self, wire: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        if not wire.numel():
            return
        values = (wire if self._fits(wire) else wire.new_empty(wire.shape).copy_(wire)).view(self.dtype)
        if accumulate:
            out.add_(values.to(out.dtype) if out.dtype == torch.float32 else values)
        else:
            out.copy_(values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"CastCodec has no state, got {sorted(state)}")


def gather_coded(
    comm: Communicator, codec: Codec | None, out: Tensor, shard: Tensor, *, about: str = ""
) -> Ticket:
    """All-gather [n] -> [world * n], encoded on the wire when a codec is given.

    Every rank decodes its own part too, so that all ranks hold the same values.
    """
    if codec is None or comm.world == 1:
        return comm.all_gather(out, shard, about=about)
    width = codec.wire_bytes(shard.numel())
    mine = comm.allocate(width, torch.uint8)
    wire = comm.allocate(width * comm.world, torch.uint8)
    coding = Coding(comm, codec, out.nbytes)
    with coding.encoding():
        codec.encode(shard.view(1, -1), mine.view(1, -1))
    with coding.sending():
        ticket = comm.all_gather(wire, mine, about=about)

    def decode() -> None:
        with coding.decoding():
            codec.decode(wire.view(comm.world, -1), out.view(comm.world, -1))

    return Ticket([ticket], keepalive=(mine, wire), finish=decode)


def reduce_coded(
    comm: Communicator,
    codec: Codec | None,
    out: Tensor,
    full: Tensor,
    *,
    scale: float,
    accumulate: bool,
    about: str = "",
) -> Ticket:
    """Reduce-scatter [world * n] -> [n]: encode, all-to-all, decode and sum in `out`'s dtype.

    A plain cast lets the communicator choose its own route; nothing is summed on the wire in low precision.
    """
    if codec is None or comm.world == 1:
        return comm.reduce_scatter(out, full, scale=scale, accumulate=accumulate, about=about)
    coding = Coding(comm, codec, full.nbytes)
    if isinstance(codec, CastCodec):
        with coding.encoding():
            wire = full if full.dtype == codec.dtype else full.to(codec.dtype)
        with coding.sending():
            return comm.reduce_scatter(out, wire, scale=scale, accumulate=accumulate, about=about)
    width = codec.wire_bytes(out.numel())
    sent = comm.allocate(width * comm.world, torch.uint8)
    received = comm.allocate(width * comm.world, torch.uint8)
    with coding.encoding():
        codec.encode(full.view(comm.world, -1), sent.view(comm.world, -1))
    with coding.sending():
        ticket = comm.all_to_all(received, sent, about=about)

    def decode() -> None:
        total = torch.zeros_like(out)
        with coding.decoding():
            for chunk in received.view(comm.world, -1):
                codec.decode(chunk.view(1, -1), total.view(1, -1), accumulate=True)
        if accumulate:
            out.add_(total, alpha=scale)
        else:
            torch.mul(total, scale, out=out)

    return Ticket([ticket], keepalive=(sent, received), finish=decode)


def all_reduce_coded(
    comm: Communicator, codec: Codec, out: Tensor, full: Tensor, *, scale: float, about: str = ""
) -> Ticket:
    """Every rank: [n] <- `scale` times the sum of everybody's [n] in `out`'s dtype, encoded on both ways.

    Each rank sums one chunk of ceil(n / world) and sends the sum on, so rounding happens twice. All ranks end
    with the same values.
    """
    n, each = full.numel(), -(-full.numel() // comm.world)
    if comm.world == 1:
        return comm.reduce_scatter(out, full, scale=scale, about=about)
    if each * comm.world != n:
        padded = comm.allocate(each * comm.world, full.dtype)
        padded[:n].copy_(full)
        padded[n:].zero_()
        full = padded
    mine = comm.allocate(each, out.dtype)
    first = reduce_coded(comm, codec, mine, full, scale=scale, accumulate=False, about=about)

    def spread() -> None:
        first.wait()
        sums = out if out.numel() == each * comm.world else comm.allocate(each * comm.world, out.dtype)
        gather_coded(comm, codec, sums, mine, about=about).wait()
        if sums is not out:
            out.copy_(sums[:n])

    return Ticket(keepalive=(full, mine), finish=spread)
