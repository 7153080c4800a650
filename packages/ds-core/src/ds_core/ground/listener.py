"""Who wants to know of each collective when it went, when it arrived and what its bytes stood for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ds_core.ground.flight import Flight, Lane
from ds_core.ground.ticket import Waitable

Part = Literal["encode", "decode"]


@dataclass(frozen=True, slots=True)
class Coded:
    """What the bytes of a collective stand for. `logical_bytes`: of the whole tensor in its own dtype."""

    codec: str
    logical_bytes: int


@dataclass(frozen=True, slots=True)
class Call:
    """One collective as this rank hands it to the wire.

    `wire_bytes`: of the whole tensor as it travels: what an all-gather gives, what a reduce-scatter takes.
    `sent_bytes`: what this rank hands out of it.
    """

    axis: str
    lane: Lane
    flight: Flight
    device: torch.device
    wire_bytes: int
    sent_bytes: int
    coded: Coded | None


class Span(Protocol):
    """One collective between its issue and its arrival. None of the calls may wait for anything."""

    def issued(self, works: Sequence[Waitable]) -> None:
        """The wire has it; `works` end with what completes last."""
        ...

    def waits(self) -> None:
        """Its ticket is waited for now: by this thread on CPU, by the current stream elsewhere."""
        ...

    def arrived(self) -> None:
        """That wait is over."""
        ...


class Listener(Protocol):
    """A communication log."""

    def begin(self, call: Call) -> Span | None:
        """A collective is about to be issued; None if this one is of no interest."""
        ...

    def coding(self, axis: str, codec: str, part: Part, device: torch.device) -> AbstractContextManager[None]:
        """Around the encoding or decoding of something that travels along `axis`."""
        ...

    def end_step(self) -> None:
        """What was counted so far belongs to the step that ends here."""
        ...

    def summary(self, *, stragglers: bool = False) -> Any:
        """What was heard so far; as text, a table. Collective over all ranks of the job with `stragglers`."""
        ...


@dataclass(frozen=True, slots=True)
class Departure:
    """A collective that is recorded and not yet on the wire."""

    lane: Lane
    flight: Flight
    span: Span | None = None

    @property
    def tag(self) -> int:
        return self.flight.tag

    def start(self, issue: Callable[[], Sequence[Waitable]]) -> Waitable:
        """Hand it to the wire."""
        span = self.span
        if span is None:
            return self.lane.start(self.flight, issue)

        def noted() -> Sequence[Waitable]:
            works = issue()
            span.issued(works)
            return works

        return _Followed(self.lane.start(self.flight, noted), span)


@dataclass(frozen=True, slots=True)
class _Followed:
    """A collective on whose arrival somebody makes a note."""

    work: Waitable
    span: Span

    def wait(self) -> None:
        self.span.waits()
        self.work.wait()
        self.span.arrived()


class Coding:
    """One tensor on its way through a codec, as far as a communication log wants to know.

    Around `codec.encode`, the collectives that carry the wire bytes, and `codec.decode`. Costs nothing to
    speak of, and changes nothing, while nobody listens.
    """

    __slots__ = ("_codec", "_comm", "_log", "_logical_bytes")

    def __init__(self, comm: Any, codec: object, logical_bytes: int) -> None:
        """`logical_bytes`: of the whole tensor before coding, as the collective's own size counts."""
        log = getattr(comm, "log", None)  # a group of one rank has none
        self._log = log if log is not None and log.listener is not None else None
        self._comm, self._codec, self._logical_bytes = comm, type(codec).__name__, logical_bytes

    def encoding(self) -> AbstractContextManager[None]:
        return self._part("encode")

    def decoding(self) -> AbstractContextManager[None]:
        return self._part("decode")

    def _part(self, part: Part) -> AbstractContextManager[None]:
        if self._log is None:
            return nullcontext()
        found: AbstractContextManager[None] = self._log.listener.coding(
            self._comm.axis, self._codec, part, self._comm.device
        )
        return found

    def sending(self) -> AbstractContextManager[None]:
        """Collectives issued inside carry what was encoded. Inside another such block that one counts."""
        return nullcontext() if self._log is None else self._sending()

    @contextmanager
    def _sending(self) -> Iterator[None]:
        assert self._log is not None
        here = self._log.here
        before = here.coded
        here.coded = before or Coded(self._codec, self._logical_bytes)
        try:
            yield
        finally:
            here.coded = before
