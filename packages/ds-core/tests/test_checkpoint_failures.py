"""Checkpoints when things go wrong or slowly: full disks, dead ranks, slow writers, background errors."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_core.state import checkpoint_commit, checkpoint_writer
from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.checkpoint_index import SaveError
from ds_core.state.checkpoint_job import SaveJob
from ds_core.state.checkpoint_staging import Snapshot
from ds_core.testing.distributed import distributed
from ds_core.testing.parts import CutPart, SteadyPart

BIG = {"w": (3 << 20,)}  # 12 MiB: three chunks


def full_after(limit: int) -> Callable[[int, Any], int]:
    """os.write on a disk that has room for `limit` bytes of data: the last write is cut short."""
    write, room = os.write, [limit]

    def limited(descriptor: int, data: Any) -> int:
        if len(data) < 65536:
            return write(descriptor, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, data[: room[0]])
        room[0] -= count
        return count

    return limited


@pytest.mark.parametrize("block", [True, False])
def test_disk_full_is_a_clear_error_and_old_steps_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, block: bool
):
    store = CheckpointStore(tmp_path)
    store.save(1, {"m": SteadyPart(BIG, seed=1)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after(5 << 20))
        with pytest.raises(
            SaveError, match=r"No space left.*free space.*wanted 125\d+ bytes, got 5242880"
        ) as told:
            store.save(2, {"m": SteadyPart(BIG, seed=2)}, block=block).result()
    error = told.value
    assert isinstance(error, OSError)
    assert (error.errno, error.rank, error.got) == (errno.ENOSPC, 0, 5 << 20)
    assert ".step-00000002." in error.path
    assert any("saving step 2 failed" in record.message for record in caplog.records)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    store.save(3, {"m": SteadyPart(BIG, seed=3)})
    part = CutPart(BIG)
    store.load({"m": part}, 1, verify=True)
    assert part.wrong(1, torch.float32) == []
    assert store.latest() == 3


def test_a_background_error_is_raised_once_by_the_next_save_or_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL)
    store, part = CheckpointStore(tmp_path), SteadyPart({"w": (4,)}, seed=1)

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        handle = store.save(1, {"m": part}, block=False)
        handle.wait()
    assert handle.done()
    with pytest.raises(SaveError, match="Permission denied"):
        store.save(2, {"m": part})
    store.save(2, {"m": part})
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        store.save(3, {"m": part}, block=False).wait()
    with pytest.raises(SaveError, match="Permission denied"):
        store.close()
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert isinstance(store.save(4, {"m": part}, block=False).exception(), SaveError)
    store.save(5, {"m": part})
    assert store.steps() == [2, 5]


def test_a_place_that_cannot_hold_checkpoints_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "run")
    with pytest.raises(
        SaveError, match=r"cannot make the directory: Not a directory.*file/run/\.step-00000001"
    ):
        store.save(1, {"m": CutPart({"w": (4,)}, seed=1)})


def slow_snapshot(patch: pytest.MonkeyPatch, seconds: float) -> threading.Event:
    """Hold every background copy up; the event says that one has begun."""
    copy_late, begun = Snapshot.copy_late, threading.Event()

    def slow(self: Snapshot) -> None:
        begun.set()
        time.sleep(seconds)
        copy_late(self)

    patch.setattr(Snapshot, "copy_late", slow)
    return begun


def test_a_part_that_announces_its_change_waits_for_the_copy_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun, store = slow_snapshot(monkeypatch, 0.3), CheckpointStore(tmp_path)
    part = SteadyPart(BIG, seed=1)
    start = time.perf_counter()
    handle = store.save(1, {"m": part}, block=False)
    returned = time.perf_counter() - start
    assert begun.wait(5)
    part.change()
    waited = time.perf_counter() - start
    assert returned < waited
    assert waited >= 0.3
    part.change()
    handle.result()
    back = CutPart(BIG)
    store.load({"m": back})
    assert back.wrong(1, torch.float32) == []


def test_the_gate_is_what_protects_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The planted bug: a part that promises and does not wait is saved as it became, and tests see it."""
    begun, store = slow_snapshot(monkeypatch, 0.3), CheckpointStore(tmp_path)
    part = SteadyPart(BIG, seed=1)
    handle = store.save(1, {"m": part}, block=False)
    assert begun.wait(5)
    part.memory("w").add_(1)
    handle.result()
    back = CutPart(BIG)
    store.load({"m": back})
    assert back.wrong(1, torch.float32) == ["w"]


def test_a_failed_save_lets_training_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Snapshot) -> None:
        raise MemoryError("no host memory")

    monkeypatch.setattr(Snapshot, "copy_late", fail)
    part = SteadyPart({"w": (4,)}, seed=1)
    handle = CheckpointStore(tmp_path).save(1, {"m": part}, block=False)
    part.change()
    assert "MemoryError: no host memory" in str(handle.exception())


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, running, most = checkpoint_writer.write_safetensors, [0], [0]

    def slow(*args: Any, **kwargs: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", slow)
    store, part = CheckpointStore(tmp_path), SteadyPart({"w": (4,)}, seed=1)
    handles = [store.save(step, {"m": part}, block=False) for step in (1, 2, 3)]
    assert [handle.done() for handle in handles] == [True, True, False]
    store.close()
    assert store.steps() == [1, 2, 3]
    assert most == [1]


def test_snapshot_memory_is_reused_and_can_be_reserved(tmp_path: Path):
    store, part = CheckpointStore(tmp_path), SteadyPart(BIG, seed=1)
    store.reserve({"m": part})
    memory = store._staging._buffer.data_ptr()
    for step in (1, 2):
        store.save(step, {"m": part}, block=False).result()
        assert store._staging._buffer.data_ptr() == memory
    store.close()
    assert store._staging._buffer.numel() == 0


@distributed(world_size=2)
def test_a_rank_that_cannot_write_fails_everyone(tmp_path: Path, rank: int, world: int):
    store, part = CheckpointStore(tmp_path), SteadyPart(BIG, rank, world, seed=1)
    store.save(1, {"m": part})
    write = os.write
    if rank == 1:
        os.write = full_after(1 << 20)
    handle = store.save(2, {"m": part}, block=False)
    error = handle.exception(30)
    os.write = write
    assert isinstance(error, SaveError)
    assert (error.rank, error.errno, error.got) == (1, errno.ENOSPC, 1 << 20), error
    assert "rank 1: cannot write" in str(error)
    assert "shard-00001" in error.path
    store.save(3, {"m": part})
    assert store.steps() == [1, 3]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@distributed(world_size=2)
def test_a_rank_that_dies_or_shares_no_directory_is_named(tmp_path: Path, rank: int, world: int):
    store = CheckpointStore(tmp_path / str(rank), timeout_s=0.5)
    part = CutPart({"w": (64,)}, rank, world, seed=1)
    words = (
        "directory that rank 0 made is not here" if rank else r"ranks \[1\] handed in nothing within 0.5 s"
    )
    with pytest.raises(SaveError, match=words):
        store.save(1, {"m": part})
    if rank == 1:
        SaveJob.run = lambda self, handle: handle.finish(None)  # type: ignore[method-assign]
    shared = CheckpointStore(tmp_path, timeout_s=0.5)
    with pytest.raises(SaveError, match=r"ranks \[1\] handed in nothing.*alive"):
        shared.save(2, {"m": part})
    assert shared.steps() == []


@distributed(world_size=2)
def test_a_save_on_one_rank_only_is_an_error_and_not_a_hang(tmp_path: Path, rank: int, world: int):
    if rank == 0:
        with pytest.raises(SaveError, match=r"waited 0.5 s in saving step 1 .*every rank must call it"):
            CheckpointStore(tmp_path, timeout_s=0.5).save(1, {"m": CutPart({"w": (4,)}, seed=1)})
    (tmp_path / f"here{rank}").touch()
    while len(list(tmp_path.glob("here*"))) < world:
        time.sleep(0.01)
    dist.destroy_process_group()  # gloo cannot go on after a timeout


def test_without_an_atomic_exchange_a_step_is_still_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_commit, "_exchange", lambda one, other: False)
    store = CheckpointStore(tmp_path)
    for seed in (1, 2):
        store.save(1, {"m": CutPart({"w": (4,)}, seed=seed)})
    part = CutPart({"w": (4,)})
    store.load({"m": part})
    assert part.wrong(2, torch.float32) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_every_cut_of_every_shape_reads_back(tmp_path: Path):
    """Boxes that are not flat ranges (columns, inner blocks) are read too."""
    from ds_core.state.checkpoint_reader import box_runs

    full = torch.arange(3 * 4 * 5).view(3, 4, 5)
    for box in [
        ((0, 0, 0), (3, 4, 5)),
        ((1, 0, 0), (2, 4, 5)),
        ((0, 1, 2), (3, 2, 2)),
        ((2, 3, 1), (1, 1, 4)),
    ]:
        cut = full[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1)
        runs: list[Tensor] = [full.view(-1)[at : at + n] for at, n in box_runs(*box, full.shape)]
        assert torch.equal(torch.cat(runs), cut)
    assert list(box_runs((0, 0), (0, 4), (3, 4))) == []
    assert list(box_runs((), (), ())) == [(0, 1)]
    assert len(list(box_runs((1, 0), (2, 4), (3, 4)))) == 1


def test_a_step_that_was_half_removed_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The process dies while an old step is being removed, a shard of it gone."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"m": SteadyPart({"w": (4,)}, seed=1)})

    def dies(path: Path) -> None:
        next(path.glob("shard-*")).unlink()
        raise KeyboardInterrupt("planted")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_commit.shutil, "rmtree", dies)
        with pytest.raises(SaveError, match="planted"):
            store.save(2, {"m": SteadyPart({"w": (4,)}, seed=2)})
    CheckpointStore(tmp_path, keep=3).save(3, {"m": SteadyPart({"w": (4,)}, seed=3)})
    assert store.steps() == [2, 3]
