"""Frozen weights kept as int8 or int4: a unit's shard in fewer bytes, widened where it is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.state.absent import ABOUT
from ds_core.state.layout import BucketLayout
from ds_kernels import Blocks, allocate_blocks, dequantize_blocks, quantize_blocks
from ds_offload.home import Home
from ds_offload.moves import Moves
from ds_offload.policy import Split, file_numel
from ds_offload.volume import Volume

WeightFormat = Literal["int8", "int4"]
BLOCK = 128  # elements that share a scale
_ALIGN = 64  # bytes, of each stretch of the packed shard
_HOME = "_ds_home"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [begin, end) of a shard, packed from byte `at`: codes, then scales; or as they are."""

    begin: int
    end: int
    at: int
    codes_bytes: int  # 0: as they are
    scales_bytes: int


@dataclass(frozen=True, slots=True)
class Packing:
    """A shard of `numel` elements of `dtype` in `nbytes` bytes (pure data)."""

    stretches: tuple[Stretch, ...]
    numel: int
    nbytes: int
    dtype: torch.dtype
    format: WeightFormat


def plan_packing(layout: BucketLayout, rank: int, dtype: torch.dtype, format: WeightFormat) -> Packing:
    """Matrices in blocks that never cross from one to another; biases, norms and padding as they are."""
    cuts = [overlap.local for overlap in layout.overlaps(rank) if len(overlap.slot.shape) > 1]
    found: list[Stretch] = []
    end = at = 0
    for low, high in [*sorted(cuts), (layout.shard_numel, layout.shard_numel)]:
        for begin, stop, packed in ((end, low, False), (low, high, True)):
            if begin == stop:
                continue
            about = allocate_blocks((stop - begin,), format=format, block=BLOCK, device=torch.device("meta"))
            codes, scales = (about.codes.nbytes, about.scales.nbytes) if packed else (0, 0)
            found.append(Stretch(begin, stop, at, codes, scales))
            size = _aligned(codes) + scales if packed else (stop - begin) * dtype.itemsize
            at += _aligned(size)
        end = max(end, high)
    return Packing(tuple(found), layout.shard_numel, at, dtype, format)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


class PackedHome:
    """A packed shard in host memory and on disk. `tensor` stands for its values; see `PackedShard`."""

    def __init__(self, packing: Packing, split: Split, volume: Volume | None, *, pinned: bool) -> None:
        self.packing = packing
        self.home = Home(
            packing.nbytes, torch.uint8, file_numel(packing.nbytes, split), volume, pinned=pinned
        )

    @property
    def tensor(self) -> Tensor:
        return PackedShard.over(self)

    @property
    def host_bytes(self) -> int:
        return self.home.host_bytes

    @property
    def file_bytes(self) -> int:
        return self.home.file_bytes

    def settle(self) -> None:
        self.home.settle()

    def abandon(self) -> list[BaseException]:
        return self.home.abandon()

    def forget(self) -> None:
        self.home.forget()

    def put(self, values: Tensor) -> None:
        """[numel] of any floating dtype, rounded to the format."""
        packed = torch.zeros(self.packing.nbytes, dtype=torch.uint8)
        values = values.detach().to("cpu", self.packing.dtype)
        for stretch in self.packing.stretches:
            part = values[stretch.begin : stretch.end]
            if stretch.codes_bytes:
                quantize_blocks(part, out=self._blocks(packed, stretch))
            else:
                self._plain(packed, stretch).copy_(part)
        self.settle()
        for future in self.home.write(0, packed):
            future.result()

    def fetch(self, moves: Moves, out: Tensor) -> Ticket:
        """Start filling `out` [numel]: the packed bytes travel, and are widened when waited for."""
        if out.device.type == "cpu" and not self.home.file_bytes:
            return Ticket(keepalive=(out,), finish=partial(self._unpack, self.home.tensor, out))
        packed = torch.empty(self.packing.nbytes, dtype=torch.uint8, device=out.device)
        ticket = moves.from_home(self.home, 0, packed)
        return Ticket([ticket], keepalive=(out, packed), finish=partial(self._unpack, packed, out))

    def values(self) -> Tensor:
        """[numel] on the host, widened now."""
        self.settle()
        out = torch.empty(self.packing.numel, dtype=self.packing.dtype)
        self._unpack(self.home.tensor, out)
        self.forget()
        return out

    def _unpack(self, packed: Tensor, out: Tensor) -> None:
        for stretch in self.packing.stretches:
            part = out[stretch.begin : stretch.end]
            if stretch.codes_bytes:
                dequantize_blocks(self._blocks(packed, stretch), out=part)
            else:
                part.copy_(self._plain(packed, stretch))

    def _blocks(self, packed: Tensor, stretch: Stretch) -> Blocks:
        numel, format = stretch.end - stretch.begin, self.packing.format
        codes = packed[stretch.at : stretch.at + stretch.codes_bytes]
        begin = stretch.at + _aligned(stretch.codes_bytes)
        scales = packed[begin : begin + stretch.scales_bytes].view(torch.float32)
        codes = codes.view(torch.int8) if format == "int8" else codes
        return Blocks(codes, scales, None, torch.Size((numel,)), self.packing.dtype, format, BLOCK)

    def _plain(self, packed: Tensor, stretch: Stretch) -> Tensor:
        dtype = self.packing.dtype
        return packed[stretch.at : stretch.at + (stretch.end - stretch.begin) * dtype.itemsize].view(dtype)


class PackedWeightsError(RuntimeError):
    """A shard that is kept in fewer bits was used as if it were a plain tensor."""


class PackedShard(Tensor):
    """A unit's shard that is kept packed.

    It can be copied from (widened) and written over (rounded anew) as a whole; anything else is refused,
    since a write to part of a copy would be lost.
    """

    @staticmethod
    def over(home: PackedHome) -> Tensor:
        dtype = home.packing.dtype
        nothing = torch.frombuffer(bytearray(16), dtype=dtype)[0].expand(home.packing.numel)
        made = torch.Tensor._make_subclass(PackedShard, nothing)
        setattr(made, _HOME, home)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT or func is Tensor.data_ptr:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.detach:
            return args[0]
        if func is Tensor.copy_ and isinstance(args[0], PackedShard):
            getattr(args[0], _HOME).put(_plain(args[1]))
            return args[0]
        if func in _WHOLE:
            return func(*(_plain(value) for value in args), **kwargs)
        home = getattr(next(value for value in args if isinstance(value, PackedShard)), _HOME)
        raise PackedWeightsError(
            f"{getattr(func, '__name__', func)}: these weights are kept as {home.packing.format} and not as "
            "numbers to read or write in place: use model.state_dict() or full_tensor(param) to read them, "
            "model.load_state_dict() or load_pretrained() to write them"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedShard({self.shape[0]}, {self.dtype})"


_WHOLE = frozenset({Tensor.clone, Tensor.to, Tensor.cpu, Tensor.copy_})


def _plain(value: Any) -> Any:
    return getattr(value, _HOME).values() if isinstance(value, PackedShard) else value
