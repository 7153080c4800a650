"""Threads of a library that must not push aside the threads that work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def background_threads() -> Iterator[None]:
    """Threads started inside are of the kernel's batch class: when they wake they wait for a free core, or
    for the end of a turn. Nothing happens where there is no such class, or where another one was chosen.

    [Note: gloo's listener spins] The listener of a gloo group tries the lock of a connection and, when a
    thread that sends holds it, asks the kernel again at once. With more ranks than cores that thread may have
    been pushed aside by the very message that woke the listener: both then wait for the end of the
    listener's turn, milliseconds for a message of microseconds.
    """
    batch = getattr(os, "SCHED_BATCH", None)
    if batch is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, batch, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
