"""What a disk can do to a run: an error that says where and how much, nothing left behind, and going on."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core import CheckpointStore
from ds_core.testing.distributed import distributed
from ds_kernels.aio import AioError
from ds_offload import TieredStore

sys.path.insert(0, str(Path(__file__).parent))

STATE = 33_000 * 4  # bytes of one kind of state of the model, at least


@contextmanager
def small_disk(where: Path, kib: int) -> Iterator[Path]:
    """A file system of its own, of so many KiB."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(where)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def begin(stage: int, disk: Path | None, make: Any = None, **settings: Any) -> Any:
    from pair import CHUNK, POLICIES, WIDE, adamw, start

    store = None
    if disk is not None:
        store = TieredStore(nvme=str(disk), chunk_numel=CHUNK, **{**POLICIES["nvme"], **settings})
    return start(WIDE, stage, store=store, make=make or adamw, dtype=torch.bfloat16)


def quiet(run: Any) -> bool:
    """Nothing is under way, and no stranger is in the optimizer or its groups."""
    pieces = {id(piece.param) for piece in run.sharded.pieces}
    grouped = [id(param) for group in run.sharded.param_groups for param in group["params"]]
    assert {id(param) for param in run.sharded.optimizer.state} <= pieces
    assert sorted(grouped) == sorted(pieces)
    end = time.monotonic() + 5  # a request is crossed off right after its future is done
    while run.store.io._engine.table.futures() and time.monotonic() < end:
        time.sleep(0.01)
    assert run.store.io._engine.table.futures() == []
    assert all(not turn.flushing for turn in run.sharded.elsewhere._turns._turns)
    assert all(not home.pending for home in run.store._homes.values())
    return True


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return sorted(name for name in found if "ds-offload-" in name)


def recovers(run: Any, stage: int, folder: Path, reached: int) -> None:
    """From its last checkpoint the run goes on as one to which nothing happened."""
    from pair import hold_equal

    straight = begin(stage, None)
    for step in range(reached):
        straight.step(step)
    CheckpointStore(folder).load(run.parts)
    hold_equal(straight, run, "from the checkpoint")
    for step in (reached, reached + 1):
        straight.step(step)
        run.step(step)
        hold_equal(straight, run, f"step {step} afterwards")


@pytest.mark.parametrize("stage", [0, 3])
@distributed(1)
def test_a_disk_that_is_full_from_the_start(stage: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 64) as disk:
        said = rf"wanted \d+ bytes more beside \d+, \d+ are free; .*'{re.escape(str(disk))}/ds-offload-"
        with pytest.raises(OSError, match=said) as full:
            begin(stage, disk)
        assert full.value.errno == errno.ENOSPC
        assert os.listdir(disk) == []
        del full
        gc.collect()
        assert open_files() == []


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(1)
def test_a_disk_that_is_full_at_the_first_step(stage: int, tmp_path: Path) -> None:
    """Masters and shards fit, gradients and moments do not; once there is room the run goes on."""
    room = {0: 2 * STATE, 2: 2 * STATE, 3: 2 * STATE + STATE // 2}[stage] // 1024 + 40
    with small_disk(tmp_path / "small", room) as disk:
        run = begin(stage, disk)
        CheckpointStore(tmp_path / "steps").save(0, run.parts)
        with pytest.raises(OSError, match=r"wanted \d+ bytes more beside \d+") as full:
            run.step(0)
        assert full.value.errno == errno.ENOSPC
        assert str(disk) in str(full.value)
        run.sharded.zero_grad()
        assert quiet(run)
        assert os.listdir(disk) == []
        with pytest.raises(OSError, match="wanted"):  # and says it again
            run.step(0)
        run.sharded.zero_grad()
        larger = ["mount", "-o", "remount,size=8m", str(disk)]
        subprocess.run(larger, check=True, capture_output=True)
        recovers(run, stage, tmp_path / "steps", 0)
        run.close()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("when", ["before the backward", "before the step"])
@distributed(1)
def test_a_file_that_somebody_cut_off(stage: int, when: str, tmp_path: Path) -> None:
    """Direct reads end early, which is an error and no crash; with its bytes back the run goes on."""
    run = begin(stage, tmp_path)
    for step in range(2):
        run.step(step)
    CheckpointStore(tmp_path / "steps").save(2, run.parts)
    if when == "before the step":
        run.backward(2)
        run.sharded.owner.drain()
    size = os.fstat(run.store.volume.fd).st_size
    os.ftruncate(run.store.volume.fd, 4096)
    with pytest.raises(AioError, match=r"the file ends at byte \d+; wanted \d+ bytes at offset \d+") as short:
        run.step(2) if when == "before the backward" else run.sharded.optimizer.step()
    assert short.value.path.startswith(str(tmp_path))
    assert short.value.errno == errno.ENODATA
    os.ftruncate(run.store.volume.fd, size)  # zeros, where state was
    run.sharded.zero_grad()
    assert quiet(run)
    recovers(run, stage, tmp_path / "steps", 2)
    run.close()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("after", [0, 3, 11])
@distributed(1)
def test_a_request_that_fails_in_the_middle_of_a_step(
    stage: int, op: str, after: int, tmp_path: Path
) -> None:
    """An error of the device, on the n-th request of the step."""
    run = begin(stage, tmp_path)
    for step in range(2):
        run.step(step)
    CheckpointStore(tmp_path / "steps").save(2, run.parts)
    run.backward(2)
    run.sharded.owner.drain()
    original, count = getattr(run.store.volume, op), [0]

    def failing(offset: int, tensor: torch.Tensor) -> Any:
        future = original(offset, tensor)
        count[0] += 1
        if count[0] != after + 1:
            return future
        future.result(20)
        failed = type(future)()
        failed.settle(
            AioError(
                errno.EIO, "planted", path=run.store.volume.path, offset=offset, wanted=tensor.nbytes, got=0
            )
        )
        return failed

    setattr(run.store.volume, op, failing)
    with pytest.raises(AioError, match="planted; wanted") as fault:
        run.sharded.optimizer.step()
    assert fault.value.path == run.store.volume.path
    delattr(run.store.volume, op)
    run.sharded.zero_grad()
    assert quiet(run)
    recovers(run, stage, tmp_path / "steps", 2)
    run.close()


@distributed(1)
def test_an_engine_that_has_ended(tmp_path: Path) -> None:
    """Every request from there on is an error that names the file; nothing hangs, also at the end."""
    run = begin(3, tmp_path)
    run.step(0)
    run.store.io.close()
    with pytest.raises(AioError, match="this AsyncIO is closed") as closed:
        run.step(1)
    assert closed.value.path == run.store.volume.path
    run.sharded.zero_grad()
    with pytest.raises(AioError, match="this AsyncIO is closed"):
        run.step(1)
    run.store.close()


class Stumbling(torch.optim.SGD):
    """Raises in one of its steps, which of a sharded model is one chunk of one."""

    elementwise = True
    left = 10**9

    def step(self, closure: Any = None) -> Any:
        type(self).left -= 1
        if type(self).left == 0:
            raise ArithmeticError("planted")
        return super().step(closure)


def stumbling(params: Any) -> torch.optim.Optimizer:
    return Stumbling(params, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("chunk", [1, 2, 5])
@distributed(1)
def test_an_optimizer_that_raises_between_a_fetch_and_a_flush(stage: int, chunk: int, tmp_path: Path) -> None:
    from pair import hold_equal

    run, straight = begin(stage, tmp_path, stumbling), begin(stage, None, stumbling)
    for step in range(2):
        run.step(step)
        straight.step(step)
    store = CheckpointStore(tmp_path / "steps")
    store.save(2, run.parts)
    run.backward(2)
    Stumbling.left = chunk
    with pytest.raises(ArithmeticError, match="planted"):
        run.sharded.optimizer.step()
    Stumbling.left = 10**9
    run.sharded.zero_grad()
    assert quiet(run)
    store.load(run.parts)
    for step in (2, 3):
        run.step(step)
        straight.step(step)
        hold_equal(straight, run, f"step {step}")
    run.close()
    del run
    gc.collect()
    assert open_files() == []


@distributed(1)
def test_the_end_of_a_run_leaves_nothing(tmp_path: Path) -> None:
    """No file, no descriptor, no byte of the volume, once nobody holds the model."""
    run = begin(3, tmp_path)
    run.step(0)
    assert len(open_files()) >= 1
    assert os.listdir(tmp_path) == []
    volume, reference = run.store.volume, run.store
    reference.close()
    del run, reference
    gc.collect()
    assert open_files() == []
    assert volume.file.buffered_fd not in {int(n) for n in os.listdir("/proc/self/fd")} or not open_files()


KILLED = """
import sys
import torch
from ds_offload import TieredStore
from ds_zero import shard
store = TieredStore(nvme=sys.argv[1], params="nvme", grads="nvme", masters="nvme", moments="nvme")
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters())
shard(model, optimizer, stage=3, store=store)
while True:
    model(torch.ones(2, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("stepped", flush=True)
"""


def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path) -> None:

    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stepped\n"
        assert os.listdir(tmp_path) == []
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert os.listdir(tmp_path) == []


@distributed(1)
def test_a_file_system_that_has_no_direct_access_is_said_once_and_works(tmp_path: Path) -> None:
    """Newer kernels take O_DIRECT on a tmpfs, so it is refused here by hand."""
    import logging

    from pair import hold_equal

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    for name in ("ds_offload", "ds_kernels"):
        logging.getLogger(name).addHandler(Listener())
    plain = os.open

    def refusing(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return plain(path, flags, *more, **named)

    os.open = refusing
    try:
        run = begin(3, tmp_path)
    finally:
        os.open = plain
    straight = begin(3, None)
    for step in range(3):
        run.step(step)
        straight.step(step)
    hold_equal(straight, run, "through the page cache")
    assert [text for text in said if "page cache" in text] == [
        f"ds-offload: {tmp_path} goes through the page cache: the file system refuses O_DIRECT "
        "(Invalid argument)"
    ]
    run.close()
