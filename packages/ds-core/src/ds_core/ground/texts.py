"""Every rank's text, by rank, over whatever gathers tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_core.ground.wire import Communicator


def exchange(comm: Communicator, text: str, *, device: torch.device | None = None, about: str) -> list[str]:
    """Every rank's text, by rank; `device` is where the communicator works (None: the CPU). Collective."""

    def gather(row: Tensor) -> list[Tensor]:
        rows = row.new_empty(comm.world * row.numel())
        comm.all_gather(rows, row, about=about).wait()
        return list(rows.view(comm.world, -1))

    return gather_texts(text, gather, device or torch.device("cpu"))


def gather_texts(text: str, gather: Callable[[Tensor], Sequence[Tensor]], device: torch.device) -> list[str]:
    """Every rank's text, by rank. `gather` gives all ranks' rows for this one's [n]; it is called twice."""
    raw = bytearray(text.encode())
    sizes = [int(size) for size in gather(torch.tensor([len(raw)], device=device))]
    row = torch.frombuffer(raw.ljust(max(*sizes, 1), b"\0"), dtype=torch.uint8).to(device)
    found = gather(row)
    return [bytes(each[:size].tolist()).decode() for each, size in zip(found, sizes, strict=True)]
