"""Faults to plant in tests: a late rank, a collective that starts late, a lost bucket, a killed rank."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.ground.ticket import Ticket
from ds_core.protocols import Communicator


@contextmanager
def slow_module(module: nn.Module, ms: float) -> Iterator[None]:
    """Make each forward of a module late; guard with the rank to make one rank late."""

    def nap(*_: Any) -> None:
        time.sleep(ms / 1000)

    hook = module.register_forward_pre_hook(nap)
    try:
        yield
    finally:
        hook.remove()


def kill_this_rank(when: bool, number: signal.Signals = signal.SIGKILL) -> None:
    """End this process by a signal if `when`, e.g. `kill_this_rank(rank == 1 and step == 3)`."""
    if when:
        os.kill(os.getpid(), number)


class _Forwarding:
    """A communicator that hands every call to another; faults override the call they spoil."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:  # group, rank, world, and what an implementation adds
        return getattr(self.inner, name)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self.inner.allocate(numel, dtype)

    def all_gather(self, out: Tensor, shard: Tensor, *, about: str = "") -> Ticket:
        return self._run("all_gather", lambda: self.inner.all_gather(out, shard, about=about))

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        return self._run(
            "reduce_scatter",
            lambda: self.inner.reduce_scatter(out, full, scale=scale, accumulate=accumulate, about=about),
        )

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", about: str = "") -> Ticket:
        return self._run("all_reduce", lambda: self.inner.all_reduce(tensor, op=op, about=about))

    def all_to_all(self, out: Tensor, src: Tensor, *, about: str = "") -> Ticket:
        return self._run("all_to_all", lambda: self.inner.all_to_all(out, src, about=about))

    def broadcast(self, tensor: Tensor, *, root: int = 0, about: str = "") -> Ticket:
        return self._run("broadcast", lambda: self.inner.broadcast(tensor, root=root, about=about))

    def _run(self, op: str, start: Callable[[], Ticket]) -> Ticket:
        return start()


class SlowCommunicator(_Forwarding):
    """Every collective starts as late as it may: when its ticket, or that of a later one, is waited for.

    So whoever reads a result before waiting reads the old bytes, and whoever reuses an input before waiting
    sends the new ones, every time and not once in a thousand. Issue order is kept; `ms` is added to each.
    """

    def __init__(self, inner: Communicator, ms: float = 0.0) -> None:
        super().__init__(inner)
        self.ms = ms
        self._pending: deque[_Late] = deque()

    def _run(self, op: str, start: Callable[[], Ticket]) -> Ticket:
        late = _Late(start)
        self._pending.append(late)
        return Ticket(finish=lambda: self._finish(late))

    def _finish(self, late: _Late) -> None:
        while not late.done:
            time.sleep(self.ms / 1000)
            first = self._pending.popleft()
            first.done = True
            first.start().wait()


class _Late:
    """A collective that has not been started yet."""

    def __init__(self, start: Callable[[], Ticket]) -> None:
        self.start = start
        self.done = False


class DroppingCommunicator(_Forwarding):
    """Loses the result of the `index`-th reduce-scatter: that gradient is zero, or stays as it was."""

    def __init__(self, inner: Communicator, index: int) -> None:
        super().__init__(inner)
        self.index = index
        self.seen = 0

    def reduce_scatter(
        self, out: Tensor, full: Tensor, *, scale: float = 1.0, accumulate: bool = False, about: str = ""
    ) -> Ticket:
        drop = self.seen == self.index
        self.seen += 1
        if not drop:
            return super().reduce_scatter(out, full, scale=scale, accumulate=accumulate, about=about)
        if not accumulate:
            out.zero_()
        # The wire still sees it, so the ranks stay in step.
        return self.inner.reduce_scatter(torch.empty_like(out), full, scale=scale, about=about)
