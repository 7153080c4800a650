"""The few things a recipe says to its other ranks by itself: share, sum, meet, and meet again as fewer."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_core import Accelerator, init_distributed, leave_distributed

_TIMEOUT = timedelta(minutes=10)
_stores: Any = dist  # torch's stubs do not export its stores


@dataclass(slots=True)
class Ranks:
    """This process among the others. One process without a launcher is a world of one."""

    accelerator: Accelerator
    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, accelerator: Accelerator) -> Ranks:
        """Enter the process group that the launcher described in the environment, if there was one.

        Collective: over all ranks of the launcher.
        """
        accelerator.activate()
        if not init_distributed(accelerator, timeout_s=_TIMEOUT.total_seconds()):
            return cls(accelerator)
        return cls(accelerator, dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """True on the one rank that writes files and talks."""
        return self.rank == 0

    def share(self, make: Callable[[], Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
        """What `make` returns on rank 0, everywhere, on the CPU; `make` runs on rank 0 only.

        Shapes: [N] -> [N] in `dtype`
        Collective: every rank calls.
        Raises: what `make` raises, on rank 0; ValueError on the others then.
        """
        if self.world == 1:
            return make().to(dtype)
        device = self.accelerator.device
        mine: Tensor | None = None
        numel = torch.tensor([-1], device=device)
        try:
            if self.leads:
                mine = make().to(dtype)
                numel.fill_(mine.numel())
        finally:
            dist.broadcast(numel, 0)
        if int(numel) < 0:
            raise ValueError("rank 0 could not go on; its message says why")
        payload = torch.empty(int(numel), dtype=dtype, device=device) if mine is None else mine.to(device)
        dist.broadcast(payload, 0)
        return payload.cpu()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks. Collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def meet(self) -> None:
        """Nobody goes on before everybody is here. Collective."""
        self.sum(0.0)

    def regroup(self, world: int) -> bool:
        """Leave the group; the first `world` ranks meet again in a new one. False on the ranks that stay out.

        Nothing may use the old group afterwards: build model, optimizer and mesh anew.
        Collective: over the old group.
        """
        stays = self.rank < world
        store = _stores.HashStore()
        if world > 1:
            store = self._open_store(stays) or store
        self.meet()
        leave_distributed()
        if not stays:
            return False
        # A group even for one rank: the launcher's environment still speaks of the old world.
        dist.init_process_group(
            self.accelerator.comm_backend, store=store, rank=self.rank, world_size=world, timeout=_TIMEOUT
        )
        self.world = world
        return True

    def _open_store(self, stays: bool) -> Any:
        """A new meeting place: the launcher's may live in the group that is about to go. Collective."""
        host = os.environ.get("MASTER_ADDR", socket.gethostname())
        opened = _stores.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.leads else None
        port = int(self.share(lambda: torch.tensor([opened.port if opened else 0])))
        if opened is None and stays:
            return _stores.TCPStore(host, port, is_master=False)
        return opened
