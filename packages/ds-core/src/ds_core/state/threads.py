"""The same work for many items in a few threads: for file work, which leaves the interpreter lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def default_workers() -> int:
    """Threads for file work: the cores this process may use, shared with the host's other ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(4, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def in_threads(work: Callable[[T], None], items: Iterable[T], *, workers: int | None = None) -> None:
    """Call `work` on every item, in order of start; this thread takes part.

    Raises: the first error, after the items under way are finished; the rest are not started.
    """
    queue = list(items)[::-1]
    failures: list[BaseException] = []
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                if not queue or failures:
                    return
                item = queue.pop()
            try:
                work(item)
            except BaseException as error:
                with lock:
                    failures.append(error)

    count = min(workers or default_workers(), len(queue))
    threads = [threading.Thread(target=take, name=f"ds-file-{number}") for number in range(1, count)]
    for thread in threads:
        thread.start()
    take()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
