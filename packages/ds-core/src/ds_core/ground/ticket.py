"""Something in flight, as a value that keeps its tensors alive until it is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Waitable(Protocol):
    """What a `torch.distributed.Work` offers us."""

    def wait(self) -> object: ...


class Ticket:
    """Holding a ticket keeps `keepalive` from being reused; `wait` orders the current stream after the work.

    `finish` runs once, after the work, on the waiting thread: a local sum, a decode, a hand-over.
    Waiting twice is harmless. A ticket whose work failed raises on every wait.
    """

    __slots__ = ("_finish", "_keepalive", "_works")

    def __init__(
        self,
        works: Sequence[Waitable] = (),
        keepalive: tuple[Tensor, ...] = (),
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._works = tuple(works)
        self._keepalive = keepalive
        self._finish = finish

    def wait(self) -> None:
        """Order the current stream (on CPU: this thread) after the work, then finish it."""
        for work in self._works:
            work.wait()
        finish, self._finish = self._finish, None
        self._works = ()
        if finish is not None:
            finish()
        self._keepalive = ()
