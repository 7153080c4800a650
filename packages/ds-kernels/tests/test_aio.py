"""Every aio engine against plain file reads: alignments, sizes, dtypes, many at once, cancelling, limits."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_kernels import AioError, AioFile, AioFuture, AlignedPool, AsyncIO
from ds_kernels.aio.choice import NAMES, EngineName, describe
from ds_kernels.aio.fallback import ALIGN

BLOCK = 2 * ALIGN
SIZES = (0, 1, 511, 512, 4096, 4097, 3 * BLOCK + 3)
OFFSETS = (0, 1, 512, ALIGN, ALIGN + 1)  # in the file
LONG = 2000 * ALIGN
SHIFTS = (0, 1, 512)  # in memory, from a page's first byte


def noise(num_bytes: int, shift: int = 0) -> Tensor:
    """Bytes of which no two runs are alike, `shift` after the beginning of a page."""
    room = torch.empty(num_bytes + 2 * ALIGN, dtype=torch.uint8)
    begin = -room.data_ptr() % ALIGN + shift
    generator = torch.Generator().manual_seed(num_bytes + shift)
    values = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return room[begin : begin + num_bytes].copy_(values)


def make_file(path: Path, num_bytes: int) -> bytes:
    content = bytes(noise(num_bytes).tolist())
    path.write_bytes(content)
    return content


@pytest.mark.parametrize("direct", [True, False])
def test_reads_are_the_files_bytes(engine: EngineName, tmp_path: Path, direct: bool) -> None:
    """And nothing next to the tensor is touched."""
    content = make_file(tmp_path / "file", 5 * BLOCK + 77)
    wrong = []
    with AsyncIO(engine=engine, block_size=BLOCK, queue_depth=4, direct=direct) as io:
        for size in SIZES:
            for offset in OFFSETS:
                for shift in SHIFTS:
                    around = noise(size + 20, shift)
                    before = around.clone()
                    got = io.read(tmp_path / "file", around[10 : 10 + size], offset).result(10)
                    before[10 : 10 + size] = torch.tensor(list(content[offset : offset + size]))
                    if got != size or not torch.equal(around, before):
                        wrong.append((size, offset, shift))
    assert not wrong


@pytest.mark.parametrize("direct", [True, False])
def test_writes_are_in_the_file(engine: EngineName, tmp_path: Path, direct: bool) -> None:
    """And what was next to them is still there."""
    content, path, wrong = bytes(noise(4 * BLOCK + 77).tolist()), tmp_path / "file", []
    with AsyncIO(engine=engine, block_size=BLOCK, queue_depth=4, direct=direct) as io:
        for size in SIZES:
            for offset in OFFSETS:
                for shift in SHIFTS:
                    path.write_bytes(content)
                    source = noise(size, shift)
                    durable = size == 4097 and shift == 0
                    got = io.write(path, source, offset, durable=durable).result(10)
                    wanted = content[:offset] + bytes(source.tolist()) + content[offset + size :]
                    if got != size or path.read_bytes() != wanted:
                        wrong.append((size, offset, shift))
    assert not wrong


def test_writes_make_files_longer(engine: EngineName, tmp_path: Path) -> None:
    """New files, holes before the first byte, and growth past the reserved space."""
    with AsyncIO(engine=engine, block_size=BLOCK) as io:
        for i, (offset, size) in enumerate([(0, 0), (0, 5), (7, 5 * BLOCK), (3 * BLOCK, 4 * BLOCK + 1)]):
            source, path = noise(size), tmp_path / str(i)
            for _ in range(2):
                io.write(path, source, offset).result(10)
                written = path.read_bytes()
                assert written == (bytes(offset) + bytes(source.tolist()) if size else b"")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_any_dtype_and_shape(engine: EngineName, tmp_path: Path, dtype: torch.dtype) -> None:
    source = (noise(3 * 5 * 7 * 8) > 127).to(dtype).view(2, 3, -1)
    with AsyncIO(engine=engine) as io, AioFile(tmp_path / "file", "rw") as file:
        assert io.write(file, source, 13).result(10) == source.nbytes
        back = torch.nn.Parameter(torch.empty_like(source), requires_grad=False)
        assert io.read(file, back, 13).result(10) == source.nbytes
        scalar = torch.zeros((), dtype=dtype)
        io.read(file, scalar, 13).result(10)
    assert torch.equal(back, source)
    assert scalar == source[0, 0, 0]


def test_many_small_requests_from_many_threads(engine: EngineName, tmp_path: Path) -> None:
    """Neighbours in one file, written and read by eight threads at once: nothing is torn."""
    count, size = 400, 701  # several in a page, and pages that two of them share
    sources = [noise(size, i % 3) for i in range(count)]
    with (
        AsyncIO(engine=engine, queue_depth=8, max_pending_bytes=20 * size) as io,
        AioFile(tmp_path / "file", "rw") as file,
        ThreadPoolExecutor(8) as pool,
    ):
        futures = list(pool.map(lambda i: io.write(file, sources[i], i * size), range(count)))
        assert sum(future.result(20) for future in futures) == count * size
        backs = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        list(pool.map(lambda i: io.read(file, backs[i], i * size), range(count)))
        io.wait_all(20)
    assert all(torch.equal(back, source) for back, source in zip(backs, sources, strict=True))
    assert (tmp_path / "file").stat().st_size == count * size


def test_two_threads_of_an_engine(engine: EngineName, tmp_path: Path) -> None:
    source, back = noise(40 * BLOCK + 1), torch.empty(40 * BLOCK + 1, dtype=torch.uint8)
    with AsyncIO(engine=engine, threads=2, queue_depth=3, block_size=BLOCK) as io:
        for _ in range(5):
            back.zero_()
            io.write(tmp_path / "file", source).result(10)
            io.read(tmp_path / "file", back).result(10)
            assert torch.equal(back, source)


def test_the_interpreter_runs_meanwhile(engine: EngineName, tmp_path: Path) -> None:
    """Another thread ticks while one waits to be let in and for results."""
    pool = AlignedPool(8 << 20, 1)
    source, ticks, over = pool.lease(), [], threading.Event()

    def tick() -> None:
        while not over.wait(0.0005):
            ticks.append(time.perf_counter())

    with AsyncIO(engine=engine, max_pending_bytes=1) as io, AioFile(tmp_path / "file", "rw") as file:
        thread = threading.Thread(target=tick)
        thread.start()
        begin = time.perf_counter()
        for _ in range(24):
            last = io.write(file, source)
        last.result(60)
        end = time.perf_counter()
        over.set()
        thread.join()
    inside = [begin, *(t for t in ticks if begin < t < end), end]
    longest = max(b - a for a, b in pairwise(inside))
    assert longest < 0.7 * (end - begin), f"silent for {longest:.3f} of {end - begin:.3f} s"


def long_requests(io: AsyncIO, folder: Path, count: int) -> list[AioFuture]:
    """Writes of thousands of blocks over files that are there, named by number."""
    paths, source = [folder / str(i) for i in range(count)], torch.zeros(LONG, dtype=torch.uint8)
    for path in paths:
        path.write_bytes(b"\1" * LONG)
    return [io.write(path, source) for path in paths]


def wait_until_begun(path: Path) -> None:
    deadline = time.monotonic() + 20
    while path.open("rb").read(1) != b"\0":
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_cancel_what_has_not_begun(engine: EngineName, tmp_path: Path) -> None:
    make_file(tmp_path / "small", 100)
    with AsyncIO(engine=engine, threads=1, queue_depth=1, block_size=ALIGN) as io:
        (first,) = long_requests(io, tmp_path, 1)
        target = torch.full((100,), 7, dtype=torch.uint8)
        second, third = io.read(tmp_path / "small", target), io.read(tmp_path / "small", target[:50])
        assert second.cancel()
        assert second.cancelled()
        assert second.done()
        assert second.cancel()
        wait_until_begun(tmp_path / "0")
        assert not first.cancel()
        assert first.result(60) == LONG
        assert third.result(10) == 50
        assert not third.cancel()
    assert (target[50:] == 7).all()
    assert not any((tmp_path / "0").read_bytes())


def test_close_with_cancel_ends_early(engine: EngineName, tmp_path: Path) -> None:
    io = AsyncIO(engine=engine, threads=1, queue_depth=2, block_size=ALIGN)
    futures = long_requests(io, tmp_path, 6)
    wait_until_begun(tmp_path / "0")
    io.close(cancel=True)
    assert all(future.done() for future in futures)
    cancelled = [future for future in futures if future.cancelled()]
    errors = [future.exception() for future in futures if future not in cancelled]
    assert cancelled == futures[len(errors) :] != []
    assert errors[:-1] == [None] * (len(errors) - 1)
    dropped = errors[-1]
    assert isinstance(dropped, AioError)
    assert dropped.errno == errno.ECANCELED
    assert dropped.got < dropped.wanted == LONG
    assert "dropped by close" in str(dropped)
    io.close()


def test_pending_bytes_are_limited(engine: EngineName, tmp_path: Path) -> None:
    """Two requests at a time are let in, and one that is larger than the limit."""
    source, waiting = torch.zeros(200 * ALIGN, dtype=torch.uint8), []
    limit = 2 * source.nbytes
    with AsyncIO(engine=engine, threads=1, queue_depth=1, block_size=ALIGN, max_pending_bytes=limit) as io:
        futures = []
        for i in range(12):
            futures.append(io.write(tmp_path / str(i), source))
            waiting.append(sum(not future.done() for future in futures))
        assert io.write(tmp_path / "large", torch.zeros(LONG, dtype=torch.uint8)).result(20) == LONG
        futures[0].result()
    assert statistics.median(waiting) <= 3  # one more may be done and not told yet


def test_blocks_go_past_the_page_cache(engine: EngineName, tmp_path: Path) -> None:
    """At any alignment, all but the edges."""
    path, size = tmp_path / "file", 20 * BLOCK
    make_file(path, size + 2 * ALIGN)
    with AioFile(path) as file:
        if not file.direct:
            pytest.skip(f"not here: {file.why}")
    if cached_pages(path):
        pytest.skip("this file system keeps all it has in the page cache")
    with AsyncIO(engine=engine, block_size=BLOCK) as io:
        for call in (io.read, io.write):
            for offset, shift in ((0, 0), (5, 5), (5, 0), (0, 5)):
                if engine == "python" and shift != offset:
                    continue  # no bounce buffers
                call(path, noise(size, shift), offset).result(10)
                assert cached_pages(path, drop=False) <= 2, (call.__name__, offset, shift)
                cached_pages(path)


def cached_pages(path: Path, drop: bool = True) -> int:
    """Pages of the file in the page cache, after dropping what can be dropped."""
    library = ctypes.CDLL(None)
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as pages:
        if drop:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        anchor = (ctypes.c_char * size).from_buffer(pages)
        assert library.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), found) == 0
        del anchor
    return sum(page & 1 for page in found)


def test_an_exception_in_the_block_drops_the_rest(engine: EngineName, tmp_path: Path) -> None:
    begin = time.perf_counter()
    futures = []

    def fail() -> None:
        with AsyncIO(engine=engine, threads=1, queue_depth=1, block_size=ALIGN) as io:
            futures.extend(long_requests(io, tmp_path, 5))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(future.done() for future in futures)
    assert time.perf_counter() - begin < 20


def test_callbacks_and_close_inside_one(engine: EngineName, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 5000)
    io, seen, closed = AsyncIO(engine=engine), [], threading.Event()
    target = torch.empty(5000, dtype=torch.uint8)
    for _ in range(10):
        io.read(tmp_path / "file", target).add_done_callback(lambda f: seen.append(f.result()))
    io.wait_all(10)
    assert seen == [5000] * 10

    def end(_: object) -> None:
        io.close()
        closed.set()

    io.read(tmp_path / "file", target).add_done_callback(end)
    assert closed.wait(10)
    io.close()


def test_tensors_live_until_their_requests_are_done(engine: EngineName, tmp_path: Path) -> None:
    """Nobody else holds them, and their memory is wanted by others."""
    with AsyncIO(engine=engine, block_size=ALIGN, queue_depth=2) as io:
        futures = [
            io.write(tmp_path / str(i), torch.full((100_000,), i, dtype=torch.uint8)) for i in range(20)
        ]
        others = [torch.full((100_000,), 255, dtype=torch.uint8) for _ in range(50)]
        assert sum(future.result(20) for future in futures) == 20 * 100_000
    assert len(others) == 50
    for i in range(20):
        assert (tmp_path / str(i)).read_bytes() == bytes([i]) * 100_000


def test_nothing_leaks(engine: EngineName, tmp_path: Path) -> None:
    """1000 requests and 20 engines: no descriptor, and no memory worth the name."""
    make_file(tmp_path / "file", 4 * ALIGN)

    def work(io: AsyncIO, count: int) -> None:
        target = torch.empty(3 * ALIGN, dtype=torch.uint8)
        for i in range(count):
            if i % 10 == 9:
                assert io.read(tmp_path / "missing", target).exception(10)
            io.read(tmp_path / "file", target, i % 7)
        io.wait_all(20)

    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE")

    def engines(count: int) -> None:
        for _ in range(count):
            with AsyncIO(engine=engine, queue_depth=4, block_size=ALIGN) as other:
                work(other, 1)
                other.read(AioFile(tmp_path / "file"), torch.empty(10)).result(10)

    with AsyncIO(engine=engine, queue_depth=4, block_size=ALIGN) as io:
        work(io, 200)
        engines(3)
        before = used()
        work(io, 1000)
        engines(20)
        gc.collect()
        after = used()
    assert after[0] <= before[0]
    assert after[1] - before[1] < 8 << 20
    assert not io._engine.table.jobs


def test_pool() -> None:
    pool = AlignedPool(5000, 3)
    assert pool.slab_bytes % 4096 == 0
    assert pool.locked or "ulimit -l" in pool.why
    slabs = [pool.lease(), pool.lease(1000, torch.float32), pool.lease(dtype=torch.bfloat16)]
    assert all(slab.data_ptr() % 4096 == 0 for slab in slabs)
    assert [slab.numel() for slab in slabs] == [8192, 1000, 4096]
    slabs[0].fill_(1), slabs[1].fill_(2), slabs[2].fill_(3)
    assert (slabs[0] == 1).all()
    with pytest.raises(RuntimeError, match="all 3 slabs are leased"):
        pool.lease()
    pool.release(slabs[1])
    assert pool.free == 1
    for wrong in (slabs[1], slabs[0][1:], torch.zeros(3)):
        with pytest.raises(ValueError, match="not a slab"):
            pool.release(wrong)
    with pytest.raises(ValueError, match="numel=5000: a slab of 8192 bytes holds 1 to 1024"):
        pool.lease(5000, torch.float64)
    kept = slabs[0]
    del pool, slabs
    assert (kept == 1).all()
    for bad in ((0, 1), (1, -1), (1.5, 1)):
        with pytest.raises(ValueError, match="allowed are whole numbers from 1"):
            AlignedPool(*bad)  # type: ignore[arg-type]


def test_describe_agrees_with_what_runs() -> None:
    with AsyncIO() as io:
        rows = describe()
        assert [row.engine for row in rows] == list(NAMES)
        assert [row.engine for row in rows if row.used] == [io.engine]
        assert all(row.why for row in rows)
