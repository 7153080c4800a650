"""aio and the life of a process: exit, fork, kill, limits, sandboxes, no compiler."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_kernels import AsyncIO
from ds_kernels.aio.choice import NAMES

PACKAGE = Path(__file__).resolve().parents[1]
START = """
import os, sys, torch
from pathlib import Path
from ds_kernels import AioError, AlignedPool, AsyncIO
folder = Path(sys.argv[1])
def full(value, mib=4): return torch.full((mib << 20,), value, dtype=torch.uint8)
"""

# What it leaves under way at the end is done by then; an AsyncIO that nobody holds any more, too.
FORK_AND_EXIT = """
def parent(io, place):
    before, back = place / "before", torch.empty(4 << 20, dtype=torch.uint8)
    io.write(before, full(3)).result()
    done = io.read(before, back[:100])
    done.result()
    slow = AsyncIO(queue_depth=1, threads=1, block_size=1 << 12)
    futures = [slow.write(place / "file", full(5)), slow.read(before, back)]
    child = os.fork()
    if child == 0: os._exit(inside(slow, before, done, futures))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [future.result() for future in futures] == [4 << 20] * 2
    assert (back == 3).all()
    assert (place / "file").read_bytes() == bytes([5]) * (4 << 20)
def inside(io, before, done, futures):
    try:
        assert done.result() == 100
        for future in futures:
            try: assert future.result() == 4 << 20  # was done before the fork
            except RuntimeError as error: assert "belongs to process" in str(error)
            assert not future.cancel()
        try: io.read(before, full(1))
        except RuntimeError as error: assert "make one here" in str(error)
        else: raise AssertionError("the parent's engine took a request")
        io.close()
        with AsyncIO() as own: own.read(before, full(1)).result()
        import atexit
        atexit._run_exitfuncs()
        return 0
    except BaseException as error:
        print("child:", repr(error), file=sys.stderr, flush=True)
        return 1
kept = []
for engine in sys.argv[2:]:
    os.environ["DS_AIO"] = engine
    place = folder / engine
    place.mkdir()
    with AsyncIO() as io: parent(io, place)
    dropped = AsyncIO()
    dropped.write(place / "dropped", full(9))
    del dropped
    kept.append(AsyncIO(queue_depth=1, threads=1, block_size=1 << 12))
for i in range(4):
    for io in kept: io.write(folder / io.engine / str(i), full(i + 1))
"""

KILLED = """
every = [AsyncIO(queue_depth=8, block_size=1 << 16, engine=engine) for engine in sys.argv[2:]]
futures = [io.write(folder / io.engine, full(1)) for io in every]
for future in futures: future.result()
print("begun", flush=True)
while True:
    futures = [io.write(folder / io.engine, full(1)) for io in every]
    for future in futures: future.result()
"""

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for engine in sys.argv[2:]:
    with AsyncIO(block_size=1 << 16, engine=engine) as io:
        for _ in range(2):
            error = io.write(folder / engine, full(1, 2)).exception()
            assert isinstance(error, AioError) and error.errno == 27, error
            assert error.got <= 1 << 20 and error.wanted == 2 << 20
        assert io.write(folder / engine, full(1, 1)).result() == 1 << 20
"""

# Answers EPERM to io_uring_setup (425) and io_setup (206), as container runtimes do.
SANDBOX = """
import ctypes, struct
def op(code, yes, no, value): return struct.pack("HBBI", code, yes, no, value)
refuse, allow = op(6, 0, 0, 0x50001), op(6, 0, 0, 0x7FFF0000)
program = op(0x20, 0, 0, 0) + op(0x15, 1, 0, 425) + op(0x15, 0, 1, 206) + refuse + allow
class Filter(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
wanted = Filter(5, program)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.addressof(wanted), 0, 0) == 0, ctypes.get_errno()
from ds_kernels.aio import describe
with AsyncIO() as io:
    io.write(folder / "file", full(1, 1)).result()
    print(io.engine, "|", io.why)
for row in describe(): print(row.engine, row.used, row.why)
"""


@pytest.fixture(scope="module")
def engines() -> list[str]:
    """All that can be had here."""
    found = []
    for name in NAMES:
        try:
            AsyncIO(engine=name).close()
        except RuntimeError as error:
            print(f"without {name}: {error}")
        else:
            found.append(name)
    return found


def start(code: str, folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(PACKAGE / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", START + code, str(folder), *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, folder: Path, *words: str) -> str:
    """What the script printed; it ended well and said nothing else."""
    process = start(code, folder, *words)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), err
    return out


def test_fork_and_exit_with_requests_under_way(engines: list[str], tmp_path: Path) -> None:
    assert run(FORK_AND_EXIT, tmp_path, *engines) == ""
    for engine in engines:
        for i in range(4):
            assert (tmp_path / engine / str(i)).read_bytes() == bytes([i + 1]) * (4 << 20)
        assert (tmp_path / engine / "dropped").read_bytes() == bytes([9]) * (4 << 20)


def test_a_killed_process_leaves_nothing(engines: list[str], tmp_path: Path) -> None:
    process = start(KILLED, tmp_path, *engines)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert sorted(os.listdir(tmp_path)) == sorted(engines)
    for engine in engines:
        with AsyncIO() as io:
            target = torch.empty(4 << 20, dtype=torch.uint8)
            io.read(tmp_path / engine, target).result(20)
            assert (target == 1).all()
            io.write(tmp_path / engine, target.fill_(2)).result(20)
        assert (tmp_path / engine).read_bytes() == bytes([2]) * (4 << 20)


def test_a_limit_on_file_sizes(engines: list[str], tmp_path: Path) -> None:
    assert run(LIMITED, tmp_path, *engines) == ""


def test_a_sandbox_without_asynchronous_calls(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"the filter's numbers are x86_64's, this is {platform.machine()}")
    said = run(SANDBOX, tmp_path).splitlines()
    assert said[0].startswith("threads | no io_uring: Operation not permitted; see /proc/sys/kernel/io_uring")
    assert "no libaio: Operation not permitted" in said[0]
    assert said[1].startswith("io_uring False Operation not permitted")
    assert said[3].startswith("threads True")


def test_no_compiler(tmp_path: Path) -> None:
    """The same API in Python threads, with one warning."""
    code = """
for _ in range(2):
    with AsyncIO() as io: io.write(folder / "file", full(1))
    print(io.engine)
try: AsyncIO(engine="libaio")
except RuntimeError as error: print(type(error).__name__)
"""
    process = start(code, tmp_path, CXX="/bin/false", DS_KERNELS_CACHE=str(tmp_path / "none"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "python\npython\nKernelUnavailable\n"), err
    assert err.count("in Python threads, because /bin/false --version exited with 1") == 1
