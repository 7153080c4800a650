"""Threads that a library starts give way to those that work."""

from __future__ import annotations

import os
import threading

import pytest

from ds_core.ground.background import background_threads
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import distributed

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this kernel has no batch class")


def classes() -> dict[int, int]:
    """The scheduling class of each thread of this process."""
    return {int(tid): os.sched_getscheduler(int(tid)) for tid in os.listdir("/proc/self/task")}


def test_threads_started_inside_are_of_the_batch_class_and_this_one_is_not() -> None:
    found: list[int] = []
    with background_threads():
        thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        thread.start()
    thread.join()
    assert found == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_class_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="planted"), background_threads():
        raise RuntimeError("planted")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_thread_of_another_class_stays_as_it_is() -> None:
    found: list[int] = []

    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with background_threads():
            found.append(os.sched_getscheduler(0))
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE] * 2


@distributed()
def test_the_threads_of_a_process_group_are_in_the_background() -> None:
    before = classes()
    Topology().build().communicator("data")
    new = {tid: kind for tid, kind in classes().items() if tid not in before}
    batch = [tid for tid, kind in new.items() if kind == os.SCHED_BATCH]
    assert len(batch) >= 2  # a listener and a worker, at least
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
