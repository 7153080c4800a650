"""Which bytes of a storage move for a tensor that autograd saves, and how it is made of them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 64  # bytes; of which the allocators give multiples, and which vector code tells apart
_MOST = 8  # times as many bytes as the tensor has may move for it


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of a storage, moved as one for every tensor that shows some of them."""

    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def of(self, tensor: Tensor) -> Tensor:
        """These bytes of the tensor's storage: [nbytes] uint8, the same memory."""
        storage = tensor.untyped_storage()
        made = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return made.set_(storage, self.begin, (self.nbytes,), (1,))


@dataclass(frozen=True, slots=True)
class Look:
    """How a tensor shows the bytes of its piece: the same strides and alignment, so the same arithmetic."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    skip: int  # elements from the piece's first byte to the tensor's first

    @classmethod
    def of(cls, tensor: Tensor, piece: Piece) -> Look:
        skip = int(tensor.storage_offset()) - piece.begin // tensor.itemsize
        return cls(tensor.dtype, tensor.size(), tensor.stride(), skip)

    def over(self, memory: Tensor) -> Tensor:
        """The tensor, over [nbytes] uint8 that hold the piece."""
        offset = memory.storage_offset() // self.dtype.itemsize + self.skip
        made = torch.empty(0, dtype=self.dtype, device=memory.device)
        return made.set_(memory.untyped_storage(), offset, self.size, self.stride)


def whole(tensor: Tensor) -> Piece:
    """All of the tensor's storage."""
    return Piece(0, tensor.untyped_storage().nbytes())


def plan_piece(storage_bytes: int, begin: int, end: int, nbytes: int) -> Piece | None:
    """The piece for a tensor of `nbytes` whose elements lie in bytes [begin, end) of its storage.

    The whole storage where the tensor is a fair part of it: its other views then share one copy, and the
    storage can go. Else the bytes that it spans, from a multiple of 64. None where it spans far more than it
    has: a column of a large matrix stays where it is.
    """
    touched = min(nbytes, end - begin)
    if storage_bytes <= _MOST * touched:
        return Piece(0, storage_bytes)
    if end - begin <= _MOST * touched:
        return Piece(begin // _ALIGN * _ALIGN, end)
    return None


def piece_of(tensor: Tensor) -> Piece | None:
    """`plan_piece` of a strided tensor with elements."""
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    size = tensor.itemsize
    return plan_piece(
        tensor.untyped_storage().nbytes(), first * size, (last + 1) * size, tensor.numel() * size
    )
