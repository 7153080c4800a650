"""Tensors over memory and a file: both ways to the file in turn, pages that go, what the last view holds."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_kernels.aio import AsyncIO
from ds_offload.mapped import PAGE, Mapping
from ds_offload.volume import Volume

BIG = 64 * PAGE


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path, AsyncIO(queue_depth=8, block_size=PAGE))
    yield made
    made.close()
    made.io.close()


def mapped(volume: Volume, host_bytes: int, file_bytes: int) -> tuple[Mapping, int]:
    extent = volume.allocate(file_bytes)
    return Mapping(host_bytes, file_bytes, fd=volume.fd, offset=extent.offset), extent.offset


def noise(numel: int, seed: int) -> Tensor:
    return torch.randint(256, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def resident_pages(mapping: Mapping) -> int:
    """KiB of the file's part that this process has in memory."""
    text = Path("/proc/self/smaps").read_text()
    start = f"{mapping.base + mapping.host_bytes:x}-"
    block = text[text.index(start) :]
    found = re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("host_bytes", [0, PAGE, 4 * PAGE])
@pytest.mark.parametrize("file_bytes", [1, PAGE, 3 * PAGE + 77])
def test_one_tensor_over_both(volume: Volume, host_bytes: int, file_bytes: int) -> None:
    mapping, offset = mapped(volume, host_bytes, file_bytes)
    values = noise(host_bytes + file_bytes, 0)
    assert mapping.tensor.shape == values.shape
    mapping.tensor.copy_(values)
    assert torch.equal(mapping.tensor, values)
    on_disk = torch.empty(file_bytes, dtype=torch.uint8)
    volume.read(offset, on_disk).result(20)
    assert torch.equal(on_disk, values[host_bytes:])
    assert os.pread(volume.fd, file_bytes, offset) == values[host_bytes:].numpy().tobytes()


def test_the_two_ways_to_the_file_agree_in_turn(volume: Volume) -> None:
    """See [Note: two ways to one file]: plain writes before direct reads, and the other way round."""
    mapping, offset = mapped(volume, PAGE, BIG)
    view, buffer = mapping.tensor[PAGE:], torch.empty(BIG, dtype=torch.uint8)
    for turn in range(20):
        values = noise(BIG, turn)
        view.copy_(values)
        volume.read(offset, buffer).result(20)
        assert torch.equal(buffer, values), f"turn {turn}: a direct read is old"
        values = noise(BIG, 1000 + turn)
        volume.write(offset, values).result(20)
        assert torch.equal(view, values), f"turn {turn}: a plain read is old"
        part = noise(3 * PAGE, 2000 + turn)
        view[PAGE : 4 * PAGE] = part  # dirty again, in part, and written over past the cache
        volume.write(offset + 2 * PAGE, values[2 * PAGE : 4 * PAGE]).result(20)
        assert torch.equal(view[PAGE : 2 * PAGE], part[:PAGE])
        assert torch.equal(view[2 * PAGE :], values[2 * PAGE :]), f"turn {turn}: dirty pages came after"
        if turn % 3 == 0:
            mapping.forget()


def test_forgetting_gives_pages_back_and_keeps_what_was_written(volume: Volume) -> None:
    mapping, _ = mapped(volume, PAGE, BIG)
    values = noise(PAGE + BIG, 1)
    mapping.tensor.copy_(values)
    assert resident_pages(mapping) == BIG // 1024
    mapping.forget()
    assert resident_pages(mapping) == 0
    assert torch.equal(mapping.tensor, values)
    Mapping(PAGE).forget()  # nothing on disk, nothing to do


def test_memory_alone_needs_no_file_and_any_size() -> None:
    for size in (0, 1, 100, PAGE, 3 << 20):
        mapping = Mapping(size)
        assert mapping.tensor.numel() == size
        mapping.tensor.fill_(7)
        assert not bool((mapping.tensor != 7).any())
        assert mapping.base % PAGE == 0


def test_a_part_of_a_file_begins_on_a_page() -> None:
    with pytest.raises(
        ValueError, match=f"host_bytes=100: before a file's part allowed are multiples of {PAGE}"
    ):
        Mapping(100, PAGE, fd=0)


def test_what_the_system_refuses_says_how_much(volume: Volume) -> None:
    with pytest.raises(OSError, match=r"mapping 4096 bytes of a file: Bad file descriptor"):
        Mapping(0, PAGE, fd=999_999)
    with pytest.raises(OSError, match=rf"mapping {1 << 62} bytes of memory: Cannot allocate memory"):
        Mapping(1 << 62)


def addresses() -> str:
    return Path("/proc/self/maps").read_text()


def test_memory_goes_with_the_last_tensor_over_it(volume: Volume) -> None:
    mapping, _ = mapped(volume, PAGE, BIG)
    start = f"{mapping.base + PAGE:x}-"
    last = mapping.tensor.view(torch.float32)[5:10].detach()
    last.fill_(3.0)
    del mapping
    gc.collect()
    assert start in addresses()
    assert last.tolist() == [3.0] * 5
    del last
    gc.collect()
    assert start not in addresses()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_nothing_is_pinned_where_nobody_could_use_it() -> None:
    assert Mapping(PAGE).pin() is False
