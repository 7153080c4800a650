"""When this rank issued each of its last collectives, and the exchange that compares ranks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from zlib import crc32

import torch

from ds_comm.stragglers import Seen, Straggler, as_rows, from_rows, plan_stragglers
from ds_core.ground.flight import Lane
from ds_core.ground.listener import Call
from ds_core.ground.mesh import Mesh


def wall_clock() -> Callable[[], int]:
    """Nanoseconds that never go back: one clock for all ranks of a host, and nearly so on another."""
    anchor = time.time_ns() - time.perf_counter_ns()
    return lambda: anchor + time.perf_counter_ns()


class Stamps:
    """Times of the last `keep` collectives, by lane and number, which are the same on every rank."""

    def __init__(self, keep: int, now: Callable[[], int]) -> None:
        self.keep, self._now = keep, now
        self._times: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._calls: dict[tuple[int, int], Seen] = {}
        self._lanes: dict[Lane, int] = {}

    def issue(self, call: Call) -> Callable[[], None]:
        """The collective goes now; call what this gives when it has arrived."""
        lane = call.lane
        if lane not in self._lanes:
            self._lanes[lane] = crc32(f"{lane.name} {lane.ranks}".encode())
        key = self._lanes[lane], call.flight.number
        self._times[key] = times = [self._now(), 0]
        self._calls[key] = Seen(call.axis, call.flight.op, lane.ranks)
        if len(self._times) > self.keep:
            self._calls.pop(self._times.popitem(last=False)[0], None)

        def arrived() -> None:
            times[1] = self._now()

        return arrived

    def compare(self, mesh: Mesh) -> dict[tuple[str, str], Straggler]:
        """(axis, op) -> who was late. Collective over all ranks of the job: one all-gather of [keep, 4]."""
        mine = {key: (issued, arrived) for key, (issued, arrived) in list(self._times.items())}
        calls = dict(self._calls)
        rows = torch.tensor(as_rows(mine, self.keep), dtype=torch.int64).view(-1)
        out = torch.empty(mesh.world * rows.numel(), dtype=torch.int64)
        comm = mesh.communicator("world", "control")
        comm.all_gather(out, rows, about="times of the communication log").wait()
        parts = out.view(mesh.world, self.keep, 4)
        stamps = {rank: from_rows(part.tolist()) for rank, part in enumerate(parts)}
        return plan_stragglers(stamps, mesh.rank("world"), calls)
