"""One file on a disk: extents that never overlap, a full disk, folders that cannot be used, a clean end."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_kernels.aio import AioError, AsyncIO
from ds_offload.volume import PAGE, Extent, Volume


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path, AsyncIO(queue_depth=4))
    yield made
    made.close()
    made.io.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def file_size(volume: Volume) -> int:
    return os.fstat(volume.fd).st_size


def test_the_file_has_no_name(volume: Volume) -> None:
    volume.allocate(10 * PAGE)
    assert os.listdir(volume.folder) == []
    assert file_size(volume) == 10 * PAGE


def test_bytes_come_back(volume: Volume) -> None:
    one, two = volume.allocate(100), volume.allocate(3 * PAGE + 1)
    assert (one, two) == (Extent(0, PAGE), Extent(PAGE, 4 * PAGE))
    first, second = (
        torch.arange(100, dtype=torch.uint8),
        torch.randint(255, (3 * PAGE + 1,), dtype=torch.uint8),
    )
    for future in [volume.write(one.offset, first), volume.write(two.offset, second)]:
        future.result(20)
    back = torch.zeros_like(second)
    assert volume.read(two.offset, back).result(20) == back.nbytes
    assert torch.equal(back, second)
    volume.read(one.offset, back[:100]).result(20)
    assert torch.equal(back[:100], first)
    assert volume.written_bytes == 100 + 3 * PAGE + 1
    assert volume.read_bytes == 3 * PAGE + 1 + 100


def test_what_is_given_back_is_used_again_and_the_end_is_cut_off(volume: Volume) -> None:
    extents = [volume.allocate(PAGE) for _ in range(5)]
    volume.free(extents[1])
    volume.free(extents[3])
    assert (volume.size, volume.used) == (5 * PAGE, 3 * PAGE)
    volume.free(extents[2])  # three holes are one
    assert volume.allocate(3 * PAGE) == Extent(PAGE, 3 * PAGE)
    volume.free(Extent(PAGE, 3 * PAGE))
    assert volume.allocate(2 * PAGE) == Extent(PAGE, 2 * PAGE)  # part of the hole
    assert volume.allocate(2 * PAGE) == Extent(5 * PAGE, 2 * PAGE)  # the rest is too small
    volume.free(Extent(5 * PAGE, 2 * PAGE))
    assert file_size(volume) == volume.size == 5 * PAGE
    volume.free(extents[4])
    assert file_size(volume) == volume.size == 3 * PAGE  # with the hole before it
    volume.free(Extent(PAGE, 2 * PAGE))
    volume.free(extents[0])
    assert (file_size(volume), volume.size, volume.used) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_extents_never_overlap(volume: Volume, seed: int) -> None:
    rng, held = random.Random(seed), list[Extent]()
    for _ in range(300):
        if held and rng.random() < 0.5:
            volume.free(held.pop(rng.randrange(len(held))))
        else:
            held.append(volume.allocate(rng.choice([1, PAGE, PAGE + 1, rng.randint(1, 50 * PAGE)])))
        ordered = sorted(held, key=lambda extent: extent.offset)
        ends = [extent.offset + extent.nbytes for extent in ordered]
        assert all(end <= after.offset for end, after in zip(ends, ordered[1:], strict=False))
        assert all(extent.offset % PAGE == extent.nbytes % PAGE == 0 for extent in held)
        assert volume.used == sum(extent.nbytes for extent in held)
        assert volume.size == file_size(volume) == max(ends, default=0)
        between = volume.size - volume.used
        assert sum(hole.nbytes for hole in volume._free) == between
    for extent in held:
        volume.free(extent)
    assert (volume.used, file_size(volume), volume._free) == (0, 0, [])


def test_a_full_disk_names_the_file_and_the_bytes_and_takes_none(small_disk: Path) -> None:
    volume = Volume(small_disk, AsyncIO(queue_depth=4))
    first = volume.allocate(512 << 10)
    with pytest.raises(
        OSError, match=r"wanted 786432 bytes more beside 524288, \d+ are free; keep less"
    ) as full:
        volume.allocate(768 << 10)
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == volume.path
    assert full.value.filename.startswith(str(small_disk))
    assert (volume.used, volume.size, file_size(volume)) == (512 << 10, 512 << 10, 512 << 10)
    rest = volume.allocate(256 << 10)  # what did fit still does
    volume.free(rest)
    volume.free(first)
    assert volume.allocate(768 << 10).nbytes == 768 << 10
    volume.close()
    volume.io.close()


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own: a limit cannot be raised again."""
    script = (
        "import errno, resource, signal, sys\n"
        "from ds_offload.volume import Volume\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "volume = Volume(sys.argv[1])\n"
        "volume.allocate(1 << 19)\n"
        "try:\n"
        "    volume.allocate(1 << 20)\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.EFBIG, error\n"
        "    assert error.filename == volume.path and 'wanted 1048576 bytes' in str(error), error\n"
        "    print('refused', volume.size)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == f"refused {1 << 19}", done.stderr


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for nowhere in (file, tmp_path / "missing"):
        with pytest.raises(ValueError, match="is no folder; give one on the disk"):
            Volume(nowhere)
    asked = []

    def refused(path: str, mode: int) -> bool:  # root may write anywhere
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", refused)
    with pytest.raises(ValueError, match="this process may not write there"):
        Volume(tmp_path)
    assert asked == [(str(tmp_path), os.W_OK | os.X_OK)]
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_direct_access_is_said_once(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer kernels let a tmpfs be opened past the cache that it is."""
    volume = Volume(small_disk, AsyncIO(queue_depth=4))
    there = torch.arange(PAGE, dtype=torch.int32)
    extent = volume.allocate(there.nbytes)
    volume.write(extent.offset, there).result(20)
    back = torch.zeros_like(there)
    volume.read(extent.offset, back).result(20)
    assert torch.equal(there, back)
    said = [record for record in caplog.records if "goes through the page cache" in record.message]
    assert len(said) == (0 if volume.file.direct else 1)
    volume.close()
    volume.io.close()


def test_after_close_nothing_reaches_a_descriptor_that_somebody_else_has(tmp_path: Path) -> None:
    """The number of a closed descriptor is the next file's: freeing must not cut that file off."""
    volume = Volume(tmp_path)
    first, last = volume.allocate(PAGE), volume.allocate(PAGE)
    numbers = {volume.file.buffered_fd, volume.file.direct_fd}
    volume.close()
    volume.close()
    others = []
    while len(others) < 50 and not numbers <= {other.fileno() for other in others} | {-1}:
        others.append((tmp_path / f"other-{len(others)}").open("wb+"))
        others[-1].write(bytes(3 * PAGE))
        others[-1].flush()
    assert numbers <= {other.fileno() for other in others} | {-1}
    volume.free(last)
    volume.free(first)
    with pytest.raises(OSError, match="of a volume that is closed"):
        volume.allocate(9 * PAGE)
    assert [os.fstat(other.fileno()).st_size for other in others] == [3 * PAGE] * len(others)
    for other in others:
        other.close()


def test_a_file_that_somebody_cut_off_is_an_error_that_says_where(volume: Volume) -> None:
    extent = volume.allocate(4 * PAGE)
    os.ftruncate(volume.fd, PAGE)
    with pytest.raises(AioError, match=f"the file ends at byte {PAGE}; wanted {4 * PAGE} bytes") as short:
        volume.read(extent.offset, torch.empty(4 * PAGE, dtype=torch.uint8)).result(20)
    assert short.value.path == volume.path
    assert short.value.errno == errno.ENODATA


def test_close_leaves_an_engine_that_was_given_to_others(tmp_path: Path) -> None:
    io = AsyncIO(queue_depth=4)
    one, two = Volume(tmp_path, io), Volume(tmp_path, io)
    extent = two.allocate(PAGE)
    one.close()
    two.write(extent.offset, torch.ones(PAGE, dtype=torch.uint8)).result(20)
    two.close()
    with pytest.raises((AioError, ValueError)):
        two.read(extent.offset, torch.ones(PAGE, dtype=torch.uint8)).result(20)
    io.close()


def test_bytes_freed_in_the_middle_of_an_allocation_wait_for_the_next(volume: Volume) -> None:
    """The collector may end a tensor while this very thread allocates; nothing waits for itself."""
    one = volume.allocate(PAGE)
    volume.allocate(PAGE)
    with volume._lock:
        volume.free(one)
        assert volume.used == 2 * PAGE
    assert volume.allocate(PAGE) == one
    assert volume.used == 2 * PAGE
