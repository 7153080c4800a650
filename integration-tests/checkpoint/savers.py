"""Programs that the checkpoint tests run as processes of their own: `python savers.py NAME ARGUMENTS`."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.state import checkpoint_commit as commit
from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.checkpoint_index import SaveError
from ds_core.state.checkpoint_job import SaveHandle, SaveJob
from ds_core.state.checkpoint_plan import collect, plan_writes
from ds_core.testing.parts import CutPart, SteadyPart

SHAPES = {"w": (512, 700), "b": (777,), "e": (300, 41, 3)}


def parts(rank: int, world: int, seed: int | None) -> dict[str, CutPart]:
    """Two parts whose contents and value follow from `seed`; zeros without."""
    values = {} if seed is None else {"seed": seed}
    model = SteadyPart(SHAPES, rank, world, seed=seed, values=values)
    return {"model": model, "optimizer": CutPart({"m": (999,)}, rank, world, seed=seed)}


def whole_and_right(store: CheckpointStore, step: int) -> None:
    """Load a step with every hash checked, and compare each element with what its seed makes."""
    found = parts(0, 1, None)
    store.load(found, step, verify=True)
    assert found["model"].values == {"seed": step}
    wrong = {name: part.wrong(step, torch.float32) for name, part in found.items()}
    assert not any(wrong.values()), (step, wrong)


def slow_down(seed: int) -> None:
    """Stretch the moments between system calls, so that kills land in all of them."""
    dice = random.Random(seed)
    for name in ("fsync", "rename", "write", "unlink"):
        real = getattr(os, name)

        def slowed(*args: Any, real: Callable[..., Any] = real, **more: Any) -> Any:
            time.sleep(dice.random() * 0.004)
            return real(*args, **more)

        setattr(os, name, slowed)


def save_for_ever(folder: str, rank: int, world: int, meet: str, seed: int) -> None:
    slow_down(seed)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(meet, world), rank=rank, world_size=world)
    store = CheckpointStore(folder, keep=3)
    step = store.latest() or 0
    while True:
        replacing = step % 4 == 3  # the other way for a step to become visible
        if replacing:
            store.save(step, parts(rank, world, step))
        step += 1
        store.save(step, parts(rank, world, step), block=step % 2 == 0)


def killed(folder: str, world: str, times: str) -> None:
    """Fork ranks that save without end, kill -9 all or one at a random moment, check; `times` times over."""
    dice, ranks, path = random.Random(int(world)), int(world), Path(folder)
    store, seen = CheckpointStore(path), []
    for number in range(int(times)):
        children = []
        for rank in range(ranks):
            child = os.fork()
            if not child:
                try:
                    save_for_ever(folder, rank, ranks, f"{folder}.meet{number}", number)
                finally:
                    os._exit(1)
            children.append(child)
        before = store.latest()
        deadline = time.monotonic() + 30
        while store.latest() in (None, before) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.15)
        for child in dice.sample(children, len(children)):
            os.kill(child, signal.SIGKILL)
            time.sleep(dice.random() * 0.02 if number % 2 else 0)
        for child in children:
            os.waitpid(child, 0)
        steps, latest = store.steps(), store.latest()
        assert latest is not None
        assert before is None or latest > before, (before, latest)
        for step in steps:
            whole_and_right(store, step)
        left = sorted(entry.name.split(".")[-1] for entry in path.iterdir() if entry.name.startswith("."))
        seen.append({"latest": latest, "left": left})
    store.save(10**6, parts(0, 1, 10**6))
    assert not [entry for entry in path.iterdir() if entry.name.startswith(".")]
    print(json.dumps(seen))


def limited(folder: str, block: str) -> None:
    """No file may grow beyond 1 MB from step 2 on."""
    store = CheckpointStore(folder)
    store.save(1, parts(0, 1, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
    with pytest.raises(SaveError) as told:
        store.save(2, parts(0, 1, 2), block=block == "block").result()
    error = told.value
    assert error.errno == errno.EFBIG, error
    assert error.got == 10**6 < error.wanted, error
    whole_and_right(store, 1)
    print(error)


def small_disk(folder: str) -> None:
    """Save until the file system is full; what was complete stays, and space makes saving work again."""
    store, step, error = CheckpointStore(folder), 0, None
    while error is None:
        step += 1
        error = store.save(step, parts(0, 1, step), block=False).exception()
    assert isinstance(error, SaveError)
    assert error.errno == errno.ENOSPC, error
    assert 0 < error.wanted > error.got, error
    assert store.steps() == list(range(1, step))
    for each in store.steps():
        whole_and_right(store, each)
    for each in store.steps()[:-1]:
        for file in store.path(each).iterdir():
            file.unlink()
        store.path(each).rmdir()
    store.save(step, parts(0, 1, step))
    whole_and_right(store, step)
    print(error)


def ends(folder: str, how: str) -> None:
    """A program that ends right after a save in the background."""
    slow_down(1)
    store = CheckpointStore(folder)
    if how == "failed":
        real = os.rename

        def refuse(*names: object) -> None:
            if str(names[1]).endswith("step-00000001"):
                raise PermissionError(errno.EACCES, "Permission denied")
            real(*names)  # type: ignore[arg-type]

        os.rename = refuse  # type: ignore[assignment]
    store.save(1, parts(0, 1, 1), block=False)
    if how == "raise":
        raise RuntimeError("training failed")
    if how == "exit":
        sys.exit(3)


def alone(folder: str) -> None:
    """Rank 0 of a world of two ends while its save waits for a rank that is dead."""
    commit._EXIT_GRACE_S = 0.5
    mine = collect(parts(0, 1, 1), None)
    commit.begin(Path(folder), 1, 7)
    job = SaveJob(Path(folder), 1, 7, 0, 2, [], mine.values, plan_writes([mine.held]), None, 600.0)
    threading.Thread(target=job.run, args=(SaveHandle(Path(folder)),), daemon=False).start()


def memory(folder: str, mega: str) -> None:
    """Peak host memory above the state itself, of a save and of loads into other cuts and dtypes."""
    torch.set_num_threads(1)
    count = int(mega)
    shapes = {f"t{i}": (512, 512) for i in range(count - 128)} | {"big": (128, 512, 512)}
    store = CheckpointStore(folder)
    part = CutPart(shapes, whole=True)
    for name in shapes:
        part.memory(name).fill_(float(len(name)))
    found = {"state": count << 20, "save": extra_peak(partial(store.save, 1, {"m": part}))}
    del part
    for key, target in (
        ("whole", CutPart(shapes, whole=True)),
        ("cut", CutPart(shapes, 1, 3)),
        ("bf16", CutPart(shapes, 0, 2, dtype=torch.bfloat16)),
    ):
        for name in shapes:
            target.memory(name).fill_(1)  # page the target in: it is the state, not an extra
        found[key] = extra_peak(partial(store.load, {"m": target}, verify=True))
        assert all(bool((target.memory(name) == len(name)).all()) for name in shapes)
        del target
    print(json.dumps(found))


def extra_peak(work: Callable[[], Any]) -> int:
    """Bytes by which the peak resident size during `work` exceeds the size before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PROGRAMS = {f.__name__: f for f in (killed, limited, small_disk, ends, alone, memory)}
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
