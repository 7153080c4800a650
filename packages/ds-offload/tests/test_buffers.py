"""Buffers that take turns: made once, grown when they must, never reused while something reads from them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from ds_offload.buffers import Turns


def test_a_buffer_is_made_once_and_grows_when_it_must() -> None:
    turn = Turns(1, pinned=False)[0]
    first = turn.buffer("master", 5000, torch.float32)
    assert (first.shape, first.dtype) == ((5000,), torch.float32)
    again = turn.buffer("master", 100, torch.bfloat16)
    assert again.data_ptr() == first.data_ptr()
    assert (again.shape, again.dtype) == ((100,), torch.bfloat16)
    assert turn.nbytes == 20000
    other = turn.buffer("grad", 10, torch.float32)
    assert other.data_ptr() != first.data_ptr()
    larger = turn.buffer("master", 6000, torch.float32)
    first.fill_(1.0)  # whoever has the old one keeps it
    larger.fill_(2.0)
    assert not bool((first != 1.0).any())
    assert turn.nbytes == 24000 + 40


def test_turns_take_turns() -> None:
    turns = Turns(3, pinned=False)
    assert turns[0] is turns[3] is turns[6]
    assert len({id(turns[index]) for index in range(9)}) == 3
    turns[1].buffer("a", 100, torch.float32)
    turns[5].buffer("a", 100, torch.float32)
    assert turns.nbytes == 800


def test_a_turn_is_empty_when_its_writes_are_done() -> None:
    turns, write = Turns(2, pinned=False), Future[int]()
    turns[0].flushing.append(write)
    done = []

    def reuse() -> None:
        turns[2].empty()
        done.append(write.done())

    waiting = threading.Thread(target=reuse)
    waiting.start()
    time.sleep(0.05)
    assert not done
    turns[1].empty()  # the other one does not wait
    write.set_result(1)
    waiting.join(20)
    assert done == [True]
    assert turns[0].flushing == []


def test_a_write_that_failed_is_raised_or_waited_for() -> None:
    turns = Turns(2, pinned=False)
    for _ in range(2):
        failed: Future[int] = Future()
        failed.set_exception(OSError("planted"))
        turns[1].flushing.append(failed)
    with pytest.raises(OSError, match="planted"):
        turns.empty()
    turns.abandon()
    turns.empty()
