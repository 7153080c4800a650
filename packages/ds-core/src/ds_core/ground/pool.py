"""Wire buffers that are used again within a step."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """Wire buffers that are used again within a step instead of cutting holes into the heap.

    Handed out by exact size; `clear` lets all of them go (a step's end, so nothing stays between steps).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel], uninitialised."""
        free = self._free.get(numel * dtype.itemsize)
        block = (
            free.pop()
            if free
            else torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device=self._device)
        )
        return block.view(dtype)

    def give_back(self, buffer: Tensor) -> None:
        """`buffer` came from `take` and nobody reads it any more."""
        self._free.setdefault(buffer.nbytes, []).append(buffer.view(torch.uint8))

    def clear(self) -> None:
        self._free.clear()
