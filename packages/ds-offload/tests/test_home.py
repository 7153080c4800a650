"""One tensor in two places: reads and writes across the cut, order, failures, space that comes back."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ds_kernels.aio import AioError, AsyncIO
from ds_offload.home import Home
from ds_offload.policy import PAGE_NUMEL
from ds_offload.volume import Volume

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path, AsyncIO(queue_depth=8))
    yield made
    made.close()
    made.io.close()


def wait(futures: list[Future[int]]) -> None:
    for future in futures:
        future.result(20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("numel", "on_disk"), [(100, 100), (100, 0), (3 * PAGE_NUMEL + 5, 2 * PAGE_NUMEL + 5), (1, 1)]
)
def test_the_tensor_and_the_fast_ways_show_the_same(
    volume: Volume, dtype: torch.dtype, numel: int, on_disk: int
) -> None:
    home = Home(numel, dtype, on_disk, volume)
    assert home.host_bytes == (numel - on_disk) * dtype.itemsize
    assert home.file_bytes == on_disk * dtype.itemsize
    values = torch.arange(numel).remainder(251).to(dtype)
    home.tensor.copy_(values)
    spans = {(0, numel), (0, 1), (numel - 1, numel), (numel // 3, numel)}
    if on_disk and home.host_numel:  # around the cut
        cut = home.host_numel
        spans |= {(cut - 2, cut + 3), (cut - 2, cut), (cut, cut + 3)}
    for begin, end in spans:
        out = torch.zeros(end - begin, dtype=dtype)
        wait(home.read(begin, out))
        assert torch.equal(out, values[begin:end])
        assert home.in_memory(begin, end) == (end <= home.host_numel)
        new = torch.full((end - begin,), 3, dtype=dtype)
        home.write(begin, new)
        home.settle()
        values[begin:end] = new
        assert torch.equal(home.tensor, values)


def test_a_read_comes_after_the_writes_before_it(volume: Volume) -> None:
    home = Home(64 * PAGE_NUMEL, torch.float32, 64 * PAGE_NUMEL, volume)
    out = torch.empty(home.numel)
    for turn in range(10):
        home.write(0, torch.full((home.numel,), float(turn)))
        wait(home.read(0, out))
        assert bool((out == turn).all())
        assert all(future.done() for future in home.pending)


def test_a_write_that_failed_is_said_once_by_the_next_use(volume: Volume) -> None:
    home = Home(PAGE_NUMEL, torch.float32, PAGE_NUMEL, volume)
    failed: Future[int] = Future()
    failed.set_exception(AioError(5, "planted", path=volume.path, offset=0, wanted=1, got=0))
    home.pending.append(failed)
    with pytest.raises(AioError, match="planted"):
        home.read(0, torch.empty(10))
    wait(home.read(0, torch.empty(10)))


def test_space_comes_back_with_the_last_tensor(volume: Volume) -> None:
    home = Home(4 * PAGE_NUMEL, torch.float32, 2 * PAGE_NUMEL, volume)
    assert volume.used == 2 * PAGE_NUMEL * 4
    held = home.tensor[-3:]
    held.fill_(1.0)
    del home
    gc.collect()
    assert volume.used == 2 * PAGE_NUMEL * 4
    other = Home(2 * PAGE_NUMEL, torch.float32, 2 * PAGE_NUMEL, volume)
    other.tensor.zero_()
    assert held.tolist() == [1.0] * 3  # nobody else got its bytes
    del held
    gc.collect()
    assert volume.used == 2 * PAGE_NUMEL * 4
    del other
    gc.collect()
    assert (volume.used, os.fstat(volume.fd).st_size) == (0, 0)


def test_a_home_in_memory_needs_no_volume() -> None:
    home = Home(10, torch.float32, 0, None)
    assert home.read(2, torch.empty(3)) == []
    assert home.write(2, torch.ones(3)) == []
    assert home.tensor[2:5].tolist() == [1.0] * 3
    home.forget()


def test_a_read_waits_for_writes_to_the_same_elements_only(tmp_path: Path) -> None:
    """Chunk i + 1 is fetched while chunk i - 1 of the same home is flushed."""
    volume = Volume(tmp_path)
    home = Home(4 * PAGE_NUMEL, torch.float32, 4 * PAGE_NUMEL, volume)
    home.tensor.copy_(torch.arange(4.0 * PAGE_NUMEL))
    never: Future[int] = Future()
    home.pending.append(never)
    home._ranges[never] = (0, PAGE_NUMEL)
    out = torch.empty(PAGE_NUMEL)
    for future in home.read(2 * PAGE_NUMEL, out):  # would wait for ever
        future.result()
    assert out[0] == 2 * PAGE_NUMEL
    threading.Timer(0.05, never.set_result, [0]).start()
    began = time.perf_counter()
    for future in home.read(PAGE_NUMEL - 1, out):
        future.result()
    assert time.perf_counter() - began > 0.04
    home.settle()
    volume.close()


def test_a_read_waits_for_a_write_that_another_thread_waits_for(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    home = Home(PAGE_NUMEL, torch.float32, PAGE_NUMEL, volume)
    late: Future[int] = Future()
    home.pending.append(late)
    home._ranges[late] = (0, PAGE_NUMEL)
    other = threading.Thread(target=home.abandon)
    other.start()
    while home.pending:  # the other thread has taken it
        time.sleep(0.001)
    threading.Timer(0.05, late.set_result, [0]).start()
    for future in home.read(0, torch.empty(PAGE_NUMEL)):
        assert late.done()
        future.result()
    other.join()
    volume.close()
