"""The table of `ds report`: every implementation of every op, which one is taken, and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ds_kernels.aio.choice import describe
from ds_kernels.registry import FAMILIES, ORDER, Implementation, Kernel, Row, forced, outlook_of, registry


def report() -> list[Row]:
    """Every implementation of every op on the devices here, which one is taken, and why. Builds nothing."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    kernels = [kernel for family in FAMILIES for kernel in registry().of(family)]
    rows = [row for kernel in kernels for device in devices for row in _report(kernel, device)]
    return rows + [Row("aio", "cpu", row.engine, row.used, row.why) for row in describe()]


def _report(kernel: Kernel, device: str) -> Iterator[Row]:
    chosen, wanted = registry().chosen.get((kernel.family, device), ()), forced()
    loaded = next((row for row in chosen if row.op == kernel.op), None)
    used: str | None = loaded.implementation if loaded else None
    every: list[Implementation] = [*ORDER[device], "native", "triton"]
    for implementation in filter(kernel.written, dict.fromkeys(every)):
        there, why = outlook_of(kernel, implementation, device)
        if used is None and there and wanted in (None, implementation):
            used = implementation
        if there and used != implementation:
            why = f"{why}; DS_KERNELS={wanted}" if wanted else f"{why}; {used} comes first"
        row = Row(kernel.op, device, implementation, used == implementation, why)
        yield loaded if loaded and row.used else row
