"""Checkpoints in the hard cases: kill -9 while saving, full disks, program ends, memory, every world."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_core.state.checkpoint import CheckpointStore
from ds_core.testing.distributed import run_ranks
from ds_core.testing.parts import CutPart, SteadyPart

PROGRAMS = Path(__file__).with_name("savers.py")
SHAPES = {"w": (33, 17), "b": (5,), "deep": (3, 4, 5, 6), "one": (1,)}


def program(*words: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAMS), *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(("world", "times"), [(1, 30), (2, 20)])
def test_kill_9_while_saving_leaves_every_visible_step_whole(tmp_path: Path, world: int, times: int):
    done = program("killed", tmp_path / "run", world, times)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == times
    # The moments were inside saves: most kills left a hidden directory behind.
    assert sum(bool(kill["left"]) for kill in seen) > times // 2, seen


@pytest.mark.parametrize("block", ["block", "background"])
def test_a_limit_on_file_size_is_a_clear_error(tmp_path: Path, block: str):
    done = program("limited", tmp_path, block)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "got 1000000" in done.stdout


def test_disk_full_leaves_what_was_complete(tmp_path: Path):
    if os.geteuid():
        pytest.skip("only root may mount a small file system; the size-limit test covers the error path")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        done = program("small_disk", tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert done.returncode == 0, done.stderr
    assert "No space left on device; free space, or keep fewer checkpoints" in done.stdout


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 3), ("raise", 1)])
def test_a_program_that_ends_finishes_its_save(tmp_path: Path, how: str, code: int):
    done = program("ends", tmp_path, how)
    assert done.returncode == code, done.stderr
    assert CheckpointStore(tmp_path).steps() == [1]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    assert done.stderr.count("Traceback") == (how == "raise"), done.stderr


def test_a_failed_save_at_the_end_is_still_said(tmp_path: Path):
    done = program("ends", tmp_path, "failed")
    assert "saving step 1 failed" in done.stderr
    assert "Permission denied" in done.stderr
    assert CheckpointStore(tmp_path).steps() == []


def test_a_program_that_ends_does_not_wait_long_for_dead_ranks(tmp_path: Path):
    done = program("alone", tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ranks [1] handed in nothing" in done.stderr
    assert CheckpointStore(tmp_path).steps() == []


@pytest.mark.slow
def test_memory_beyond_the_state_is_bounded(tmp_path: Path):
    done = program("memory", tmp_path, 1024)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("state") == 1 << 30
    assert max(found.values()) < 64 << 20, found  # the promise is one bucket + 256 MB


def save(rank: int, world: int, folder: str) -> None:
    parts = {"model": CutPart(SHAPES, rank, world, seed=world), "whole": CutPart(SHAPES, whole=True, seed=9)}
    CheckpointStore(folder).save(world, parts, {"world": world}, block=world % 2 == 0).result()


def load(rank: int, world: int, folder: str, saved: int) -> None:
    parts = {"model": CutPart(SHAPES, rank, world), "whole": CutPart(SHAPES, rank, world)}
    assert CheckpointStore(folder).load(parts, saved, verify=True) == {"world": saved}
    assert parts["model"].wrong(saved, torch.float32) == []
    assert parts["whole"].wrong(9, torch.float32) == []


def test_any_world_loads_any_others(tmp_path: Path):
    for world in (1, 2, 3, 4):
        run_ranks(save, world, folder=str(tmp_path))
    for world in (1, 2, 3, 4):
        for saved in (1, 2, 3, 4):
            run_ranks(load, world, folder=str(tmp_path), saved=saved)


@pytest.mark.slow
def test_the_pause_of_a_background_save_is_far_below_a_copy_and_saves_queue_up(tmp_path: Path):
    part = SteadyPart({f"w{i}": (1024, 1024) for i in range(48)}, seed=1)  # 192 MiB
    eager = CutPart(part.shapes, seed=1)
    pauses: dict[str, list[float]] = {"announced": [], "copied": [], "whole": []}
    with CheckpointStore(tmp_path, keep=1) as store:
        store.reserve({"m": part})
        for step in range(5):
            for name, each in (("announced", part), ("copied", eager)):
                start = time.perf_counter()
                handle = store.save(2 * step + (name == "copied"), {"m": each}, block=False)
                pauses[name].append(time.perf_counter() - start)
                handle.result()
                pauses["whole"].append(time.perf_counter() - start)
        start = time.perf_counter()
        store.save(100, {"m": part}, block=False)
        first = time.perf_counter() - start
        store.save(101, {"m": part}, block=False)
        assert 100 in store.steps(), "the second save must have waited for the first"
        assert time.perf_counter() - start > first
    median = {name: statistics.median(times) for name, times in pauses.items()}
    print(median)
    assert median["announced"] < 0.1, median
    assert median["announced"] < median["copied"] < median["whole"], median
    shutil.rmtree(tmp_path / "step-00000101")
