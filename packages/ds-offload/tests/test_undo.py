"""What makes rolling back free: pages and extents that change places, and homes that stay consistent."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ds_offload import Volume
from ds_offload.home import Home
from ds_offload.mapped import PAGE, Mapping
from ds_offload.pages import swap_pages
from ds_offload.policy import PAGE_NUMEL

NUMEL = 3 * PAGE_NUMEL


def counting(numel: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + numel, dtype=torch.float32)


def test_pages_change_places_and_addresses_stay() -> None:
    one, two = Mapping(8 * PAGE), Mapping(8 * PAGE)
    for start in (0, 2 * PAGE):
        one.tensor.fill_(1)
        two.tensor.fill_(2)
        at = one.tensor.data_ptr()
        assert swap_pages(one.base + start, two.base, 3 * PAGE)
        wanted = torch.ones(8 * PAGE, dtype=torch.uint8)
        wanted[start : start + 3 * PAGE] = 2
        assert one.tensor.data_ptr() == at
        assert torch.equal(one.tensor, wanted)
        assert torch.equal(two.tensor[: 3 * PAGE], torch.ones(3 * PAGE, dtype=torch.uint8))
        assert bool((two.tensor[3 * PAGE :] == 2).all())


def test_large_pages_change_places_too() -> None:
    numbers = torch.arange(16 << 20, dtype=torch.int32).view(torch.uint8)
    one, two = Mapping(numbers.numel()), Mapping(numbers.numel())
    one.tensor.copy_(numbers)
    two.tensor.fill_(3)
    start = 5 * PAGE  # in the middle of one
    assert swap_pages(one.base + start, two.base, 4 << 20)
    assert torch.equal(two.tensor[: 4 << 20], numbers[start : start + (4 << 20)])
    assert bool((one.tensor[start : start + (4 << 20)] == 3).all())
    assert torch.equal(one.tensor[:start], numbers[:start])
    assert torch.equal(one.tensor[start + (4 << 20) :], numbers[start + (4 << 20) :])


def test_what_is_no_page_is_left_alone() -> None:
    one, two = Mapping(4 * PAGE), Mapping(4 * PAGE)
    one.tensor.fill_(1)
    assert not swap_pages(one.base + 8, two.base, PAGE)
    assert not swap_pages(one.base, two.base, 0)
    assert bool((one.tensor == 1).all())


@pytest.mark.parametrize("file_numel", [0, PAGE_NUMEL, NUMEL])
@pytest.mark.parametrize("begin", [0, PAGE_NUMEL, 100])
def test_a_home_takes_what_a_buffer_holds(begin: int, file_numel: int, tmp_path: Path) -> None:
    """At a page or between two, in memory, in the file, or across."""
    volume = Volume(tmp_path)
    home = Home(NUMEL + 10, torch.float32, file_numel + 10 if file_numel else 0, volume)
    home.tensor.copy_(counting(NUMEL + 10))
    seen, numel = home.tensor._version, NUMEL + 10 - begin
    values = Mapping(numel * 4)
    values.tensor[: numel * 4].view(torch.float32).copy_(counting(numel, 1000))
    home.take(begin, values, numel)
    home.settle()
    assert torch.equal(home.tensor, torch.cat([counting(begin), counting(numel, 1000)]))
    assert home.tensor._version > seen or begin >= home.host_numel
    volume.close()


@pytest.mark.parametrize("file_numel", [0, PAGE_NUMEL, NUMEL])
def test_a_home_becomes_another(file_numel: int, tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    one, two = (Home(NUMEL, torch.float32, file_numel, volume) for _ in range(2))
    shown = one.tensor[100:200]
    for turn in range(3):  # there and back
        one.tensor.copy_(counting(NUMEL))
        fresh = counting(NUMEL, 5000 + turn)
        two.write(0, fresh)
        one.become(two)
        assert torch.equal(one.tensor, fresh)
        assert torch.equal(shown, fresh[100:200])
        found = torch.empty(NUMEL)
        for future in one.read(0, found):
            future.result()
        assert torch.equal(found, fresh)
    used = volume.used
    del one, shown
    gc.collect()
    assert volume.used == used - (-(-file_numel * 4 // PAGE) * PAGE)
    assert torch.equal(two.tensor, counting(NUMEL)) or not file_numel  # what was in `one` before, still ours
    del two
    gc.collect()
    assert volume.used == 0
    volume.close()


def test_every_thread_waits_for_a_write(tmp_path: Path) -> None:
    """A write that one thread already waits for is not there yet for another one either."""
    volume = Volume(tmp_path)
    home = Home(NUMEL, torch.float32, NUMEL, volume)
    write: Future[int] = Future()
    home.pending.append(write)
    done: list[str] = []

    def wait(name: str) -> None:
        home.settle()
        done.append(name)

    threads = [threading.Thread(target=wait, args=(name,), daemon=True) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert not done
    write.set_result(0)
    for thread in threads:
        thread.join(10)
    assert sorted(done) == ["one", "two"]
    volume.close()
