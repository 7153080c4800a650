"""What ranks tell each other around a checkpoint: small agreements, on the calling thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.ground.mesh import lane_of
from ds_core.ground.texts import gather_texts
from ds_core.state.checkpoint_index import SaveError


class Peers:
    """The ranks that share a checkpoint; one process alone when torch.distributed is not initialised."""

    def __init__(self, group: ProcessGroup | None = None, timeout_s: float = 600.0) -> None:
        self._group, self._timeout_s = group, timeout_s
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if joined else 0
        self.world = dist.get_world_size(group) if joined else 1
        self._device = torch.device("cpu")
        if joined and "gloo" not in str(dist.get_backend(group)):
            self._device = torch.device(str(torch.accelerator.current_accelerator()))

    def agree(
        self, numbers: Sequence[int], error: Exception | None, doing: str, *, entering: bool = False
    ) -> list[list[int]]:
        """Every rank's numbers, by rank; if any rank comes with an error, all ranks raise.

        `entering`: ranks come here from training, where one may never come, so the wait is bounded.

        Collective: over the group.
        Raises: `error` itself where it happened, SaveError naming that rank elsewhere.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return [list(numbers)]
        row = torch.tensor([int(error is not None), *numbers], dtype=torch.int64, device=self._device)
        late = f"waited {self._timeout_s:g} s in {doing} for other ranks; every rank must call it"
        rows = [values.tolist() for values in self._gather(row, doing, late if entering else None)]
        if any(values[0] for values in rows):
            texts = self.gather_text("" if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, values in enumerate(rows) if values[0])
            raise SaveError(f"{doing} stopped on all ranks: {texts[rank]}", rank=rank)
        return [values[1:] for values in rows]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, by rank.

        Collective: over the group.
        """
        if self.world == 1:
            return [text]
        return gather_texts(text, lambda row: self._gather(row, "texts"), self._device)

    def _gather(self, row: Tensor, doing: str, late: str | None = None) -> list[Tensor]:
        """`late` is what to raise when others do not come in time; None waits as long as the group does."""
        out = [torch.empty_like(row) for _ in range(self.world)]
        lane = lane_of("checkpoint", self._group)
        flight = lane.record("all_gather", row, doing)
        work = dist.all_gather(out, row, group=self._group, async_op=True)
        wait = _Bounded(work, self._timeout_s, SaveError(late, rank=self.rank)) if late else work
        lane.wait(flight, [wait])
        return out


@dataclass(frozen=True, slots=True)
class _Bounded:
    """Work that is waited for no longer than `limit_s`."""

    work: Any
    limit_s: float
    late: SaveError

    def wait(self) -> None:
        start = time.monotonic()
        try:
            self.work.wait(timedelta(seconds=self.limit_s))
        except RuntimeError as error:
            if time.monotonic() - start < self.limit_s:
                raise
            raise self.late from error
