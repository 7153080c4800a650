"""aio when things go wrong: an AioError or a ValueError that says what, and nothing else stops for it."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import warnings
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_kernels import AioError, AioFile, AsyncIO, KernelUnavailable
from ds_kernels.aio import choice
from ds_kernels.aio.choice import EngineName
from ds_kernels.aio.fallback import ALIGN


def zeros(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def failure(future: Any) -> AioError:
    """The error of a request, which has said where and how much."""
    error = future.exception(20)
    assert isinstance(error, AioError), error
    assert error.path in str(error)
    assert f"wanted {error.wanted} bytes at offset {error.offset}, got {error.got}" in str(error)
    return error


@pytest.mark.parametrize("size", [1, 4096, 3 * ALIGN + 3])
@pytest.mark.parametrize("offset", [0, 5])
def test_the_file_ends(engine: EngineName, tmp_path: Path, size: int, offset: int) -> None:
    """Anywhere: empty, in a head, in a block, at a block's end; what was there has been read."""
    with AsyncIO(engine=engine, block_size=ALIGN, queue_depth=2) as io:
        for there in {n for n in (0, 3, size // 2, size // ALIGN * ALIGN, size - 1) if n < size}:
            path, target = tmp_path / "file", zeros(size)
            path.write_bytes(b"\1" * (there + offset))
            error = failure(io.read(path, target, offset))
            assert (error.errno, error.got, error.wanted) == (errno.ENODATA, there, size)
            assert f"the file ends at byte {there + offset}" in str(error)
            assert target.tolist() == [1] * there + [0] * (size - there)
            past = failure(io.read(path, target, offset + size + 10 * ALIGN))
            assert past.got == 0


def test_paths(engine: EngineName, tmp_path: Path) -> None:
    """Missing, a folder, a pipe, in a file, without leave."""
    pipe, file, closed = tmp_path / "pipe", tmp_path / "file", tmp_path / "closed"
    os.mkfifo(pipe)
    file.write_bytes(bytes(10))
    closed.mkdir(mode=0)
    some = zeros(10)
    with AsyncIO(engine=engine) as io:
        found = [
            failure(io.read(tmp_path / "missing", some)).errno,
            failure(io.write(tmp_path / "missing" / "file", some)).errno,
            failure(io.read(tmp_path, some)).errno,
            failure(io.write(tmp_path, some)).errno,
            failure(io.read(pipe, some)).errno,
            failure(io.write(file / "in", some)).errno,
            failure(io.sync(tmp_path / "missing")).errno,
        ]
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            found.append(failure(io.write(closed / "file", some)).errno)
        finally:
            os.seteuid(user)
        io.sync(tmp_path).result(10)
        io.sync(file).result(10)
    wanted = [errno.ENOENT, errno.ENOENT, errno.EISDIR, errno.EISDIR, errno.ESPIPE]
    assert found in (
        [*wanted, errno.ENOTDIR, errno.ENOENT, errno.EACCES],
        [*wanted[:4], errno.ENXIO, errno.ENOTDIR, errno.ENOENT, errno.EACCES],
    )


def test_the_device_is_full(engine: EngineName, tmp_path: Path) -> None:
    """Others under way go on."""
    with AsyncIO(engine=engine, block_size=ALIGN) as io:
        good = [io.write(tmp_path / str(i), zeros(10 * ALIGN)) for i in range(3)]
        error = failure(io.write("/dev/full", zeros(5 * ALIGN), 7))
        good += [io.write(tmp_path / str(i), zeros(10 * ALIGN)) for i in range(3, 6)]
        assert [future.result(20) for future in good] == [10 * ALIGN] * 6
    assert (error.errno, error.got, error.wanted) == (errno.ENOSPC, 0, 5 * ALIGN)


def test_a_small_file_system(engine: EngineName, tmp_path: Path) -> None:
    """A tmpfs of 1 MiB: what fits is written, what does not is an error; the reserve finds it at once."""
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        with AsyncIO(engine=engine, block_size=ALIGN) as io:
            assert io.write(where / "fits", zeros(100 * ALIGN)).result(20) == 100 * ALIGN
            error = failure(io.write(where / "not", zeros(200 * ALIGN)))
            assert error.errno == errno.ENOSPC
            assert error.got <= 156 * ALIGN
            assert io.read(where / "fits", zeros(100 * ALIGN)).result(20) == 100 * ALIGN
        with AsyncIO(engine=engine, block_size=1 << 20) as io:  # too short to be reserved
            error = failure(io.write(where / "more", zeros((1 << 20) - 1)))
            assert (error.errno, error.wanted) == (errno.ENOSPC, (1 << 20) - 1)
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_descriptor_that_goes_bad(engine: EngineName, tmp_path: Path) -> None:
    """The error of a block in the middle of many, with others under way."""
    (tmp_path / "file").write_bytes(bytes(100 * ALIGN))
    with (
        AsyncIO(engine=engine, block_size=ALIGN, queue_depth=8) as io,
        AioFile(tmp_path / "file") as file,
        AioFile(tmp_path / "file") as bad,
    ):
        kept = bad.direct_fd, bad.buffered_fd
        folder = os.open(tmp_path, os.O_RDONLY)
        bad.buffered_fd = folder
        bad.direct_fd = folder if bad.direct else -1
        error = failure(io.read(bad, zeros(50 * ALIGN)))
        assert (error.errno, error.got) == (errno.EISDIR, 0)
        assert io.read(file, zeros(100 * ALIGN)).result(10) == 100 * ALIGN
        bad.direct_fd, bad.buffered_fd = kept
        os.close(folder)


def test_closed(engine: EngineName, tmp_path: Path) -> None:
    io = AsyncIO(engine=engine)
    file = AioFile(tmp_path / "file", "rw")
    under_way = io.write(file, zeros(20 * ALIGN))
    file.close()
    assert under_way.result(10) == 20 * ALIGN
    with pytest.raises(ValueError, match="the AioFile is closed"):
        io.read(file, zeros(1))
    io.close()
    io.close()
    with pytest.raises(AioError, match="this AsyncIO is closed; wanted 3 bytes at offset 5") as caught:
        io.write(tmp_path / "other", zeros(3), 5)
    assert caught.value.errno == errno.EBADF
    assert not (tmp_path / "other").exists()


def test_wait_all_tells_what_nobody_asked_about(engine: EngineName, tmp_path: Path) -> None:
    io = AsyncIO(engine=engine)
    seen = io.read(tmp_path / "asked", zeros(1))
    assert seen.exception(10)
    io.read(tmp_path / "lost", zeros(1))
    io.read(tmp_path / "lost too", zeros(1))
    with pytest.raises(AioError, match="lost") as caught:
        io.wait_all(10)
    assert caught.value.__notes__ == ["and 1 more requests failed"]
    io.wait_all(10)
    with pytest.raises(AioError, match="missing"), io:
        io.read(tmp_path / "missing", zeros(1))


def test_timeouts(engine: EngineName, tmp_path: Path) -> None:
    with AsyncIO(engine=engine, threads=1, queue_depth=1, block_size=ALIGN) as io:
        future = io.write(tmp_path / "file", zeros(32 << 20))
        with pytest.raises(TimeoutError):
            future.result(0.001)
        with pytest.raises(TimeoutError, match=r"1 requests are not done after 0.001 s"):
            io.wait_all(0.001)
        waiting = io.write(tmp_path / "other", zeros(5))
        assert waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(4, 4).t(), "non-contiguous view"),
        (torch.zeros(8)[::2], "contiguous"),
        (torch.zeros(1).expand(4), "contiguous"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "contiguous"),
        (torch.zeros(4, device="meta"), "memory of meta; go through a CPU tensor"),
        (torch.zeros(4).to_sparse(), "layout torch.sparse_coo"),
        ([1.0], "cannot .* a list; allowed are plain tensors"),
    ],
)
def test_tensors_that_are_not_bytes_in_a_row(tmp_path: Path, tensor: Any, words: str) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with AsyncIO(engine="python") as io:
        for call in (io.read, io.write):
            with pytest.raises(ValueError, match=words):
                call(tmp_path / "file", tensor)


def test_read_only_memory(engine: EngineName, tmp_path: Path) -> None:
    """A file mapped read-only: torch does not know, and a store would end the process."""
    path = tmp_path / "mapped"
    path.write_bytes(bytes(8192))
    path.chmod(0o400)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings(action="ignore"):  # torch says once per process that it does not care
        target = torch.frombuffer(pages, dtype=torch.uint8)
    with AsyncIO(engine=engine) as io:
        with pytest.raises(ValueError, match=r"its memory is read-only; read into a clone\(\)"):
            io.read(path, target[1:100])
        assert io.write(tmp_path / "copy", target).result(10) == 8192


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"queue_depth": 0}, "queue_depth=0: allowed are whole numbers from 1 to 4096"),
        ({"queue_depth": True}, "queue_depth=True"),
        ({"block_size": 1000}, "block_size=1000: allowed are whole numbers from 4096"),
        ({"block_size": ALIGN + 1}, f"block_size={ALIGN + 1}: allowed are multiples of {ALIGN}"),
        ({"block_size": 1e6}, "block_size=1000000.0"),
        ({"threads": -1}, "threads=-1: allowed are whole numbers from 1 to 64"),
        ({"threads": 5, "queue_depth": 4}, "threads=5: allowed are whole numbers from 1 to 4"),
        ({"max_pending_bytes": 0}, "max_pending_bytes=0"),
        ({"engine": "fast"}, "engine='fast': allowed are 'io_uring', 'libaio', 'threads', 'python'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AsyncIO(**arguments)


def test_bad_requests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with AsyncIO() as io, AioFile(tmp_path / "file") as reading, AioFile(tmp_path / "file", "w") as writing:
        for offset in (-1, 1.5, None, 1 << 63):
            with pytest.raises(ValueError, match=r"offset=.*allowed are whole numbers from 0"):
                io.read(reading, zeros(3), offset)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="opened with mode 'r', which cannot write"):
            io.write(reading, zeros(3))
        with pytest.raises(ValueError, match="opened with mode 'w', which cannot read"):
            io.read(writing, zeros(3))
        assert failure(io.write(writing, zeros(3), (1 << 63) - 4)).got == 0
    with pytest.raises(ValueError, match="mode='x': allowed are"):
        AioFile(tmp_path / "file", "x")  # type: ignore[arg-type]


def test_an_engine_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_AIO", "threads")
    with AsyncIO() as io, AsyncIO(engine="python") as other:
        assert (io.engine, other.engine, io.why) == ("threads", "python", "asked for")
    assert [row.engine for row in choice.describe() if row.used] == ["threads"]
    monkeypatch.setenv("DS_AIO", "aio")
    with pytest.raises(ValueError, match="DS_AIO='aio': allowed are"):
        AsyncIO()
    monkeypatch.delenv("DS_AIO")
    monkeypatch.setenv("DS_KERNELS", "reference")
    with AsyncIO() as io:
        assert io.engine == "python"


def test_an_engine_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(choice.NativeEngine):
        def __init__(self, name: str, settings: choice.Settings) -> None:
            if name != "threads":
                raise OSError(errno.EPERM if name == "io_uring" else errno.EAGAIN, "no")
            super().__init__(name, settings)

    monkeypatch.setattr(choice, "NativeEngine", Refused)
    with AsyncIO() as io:
        assert io.engine == "threads"
        assert "no io_uring: Operation not permitted; see /proc/sys/kernel/io_uring_disabled" in io.why
        assert "no libaio: Resource temporarily unavailable; raise /proc/sys/fs/aio-max-nr" in io.why
    with pytest.raises(KernelUnavailable, match=r"aio engine 'io_uring' cannot be had: no io_uring: Oper"):
        AsyncIO(engine="io_uring")


def test_o_direct_refused(
    engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the page cache it is, and one warning."""
    opening = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opening(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    source, back = zeros(5 * ALIGN).fill_(7), zeros(5 * ALIGN)
    with AsyncIO(engine=engine, block_size=ALIGN) as io, AioFile(tmp_path / "file", "rw") as file:
        assert not file.direct
        assert file.why == "the file system refuses O_DIRECT (Invalid argument)"
        io.write(tmp_path / "file", source).result(10)
        io.read(tmp_path / "file", back).result(10)
    assert torch.equal(source, back)
    assert len([record for record in caplog.records if "goes through the page cache" in record.message]) == 1
