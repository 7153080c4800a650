"""State on disk in checkpoints: any world, stage and tier reads any other's; written from where it lives."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ds_core import CheckpointStore
from ds_core.state import checkpoint_writer
from ds_core.state.export import export_hf
from ds_core.testing.distributed import distributed, run_ranks
from ds_offload import TieredStore
from ds_zero import EMA, full_tensor

sys.path.insert(0, str(Path(__file__).parent))

# (world, stage, tier) of the run that saves, and of those that go on.
SAVED = [(2, 3, "nvme"), (3, 1, "mixed"), (1, 0, "nvme"), (4, 2, "host")]
RESUMED = [(1, 3, "mixed"), (2, 0, "nvme"), (3, 3, "nvme"), (2, 2, "none")]


def begin(stage: int, tier: str, disk: Path, **more: Any) -> Any:
    from pair import CHUNK, POLICIES, WIDE, start

    store = None
    if tier != "none":
        store = TieredStore(nvme=str(disk), chunk_numel=CHUNK, **POLICIES[tier])
    return start(WIDE, stage, store=store, dtype=torch.bfloat16, **more)


def save(stage: int, tier: str, folder: Path) -> None:
    """The same run without and with a store, each into a checkpoint; the second while training goes on."""
    from pair import hold_equal

    runs = [begin(stage, each, folder) for each in ("none", tier)]
    for step in range(2):
        for run in runs:
            run.step(step)
    stores = [CheckpointStore(folder / name) for name in ("plain", "tiered")]
    for run, store, block in zip(runs, stores, (True, False), strict=True):
        store.save(2, run.parts, block=block)
    for step in (2, 3):  # what is written is what was there when it was asked for
        for run in runs:
            run.step(step)
    stores[1].wait()
    hold_equal(*runs, "after a save in the background")
    for run in runs:
        run.close()


def go_on(stage: int, tier: str, folder: Path) -> None:
    """Each from its own checkpoint: they held the same, and training from them is the same."""
    from pair import hold_equal

    runs = [begin(stage, each, folder) for each in ("none", tier)]
    for run, name in zip(runs, ("plain", "tiered"), strict=True):
        run.step(77)  # what is there already is replaced
        CheckpointStore(folder / name).load(run.parts)
    hold_equal(*runs, "loaded")
    for step in (2, 3):
        for run in runs:
            run.step(step)
        hold_equal(*runs, f"step {step}")
    for run in runs:
        run.close()


@pytest.mark.parametrize(("world", "stage", "tier"), SAVED)
def test_any_world_stage_and_tier_reads_any_other(world: int, stage: int, tier: str, tmp_path: Path) -> None:
    run_ranks(save, world, stage=stage, tier=tier, folder=tmp_path)
    for again, other, to in RESUMED:
        run_ranks(go_on, again, stage=other, tier=to, folder=tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
@distributed(2)
def test_going_on_is_as_if_nothing_had_happened(stage: int, tmp_path: Path) -> None:
    """Back to a checkpoint and over the same batches again, with an average beside it."""
    from pair import hold_equal

    run, straight = begin(stage, "nvme", tmp_path), begin(stage, "nvme", tmp_path)
    averages = [EMA(each.model, 0.5) for each in (run, straight)]
    store = CheckpointStore(tmp_path / "steps")
    parts = {**run.parts, "ema": averages[0]}
    for step in range(4):
        if step == 2:
            store.save(2, parts, block=False)
        run.step(step)
    store.wait()
    store.load(parts)
    for step in (2, 3):
        run.step(step)
    for step in range(4):
        straight.step(step)
    hold_equal(run, straight, "after going back")
    with averages[0].applied(), averages[1].applied():
        hold_equal(run, straight, "the averages")
    for each in (run, straight):
        each.close()


@distributed(2)
def test_a_save_in_the_background_writes_from_the_disk_and_holds_the_step_back(tmp_path: Path) -> None:
    """No byte that is on disk is copied into memory for it, and none changes before it is written."""
    from pair import hold_equal

    run, twin = begin(3, "nvme", tmp_path), begin(3, "none", tmp_path)
    for each in (run, twin):
        each.step(0)
    store, original = CheckpointStore(tmp_path / "steps"), checkpoint_writer.write_safetensors
    may_write, stepped = threading.Event(), threading.Event()

    def slow(*args: Any, **named: Any) -> Any:
        may_write.wait(20)
        return original(*args, **named)

    checkpoint_writer.write_safetensors = slow
    try:
        store.save(1, run.parts, block=False)
        on_disk = run.store.bytes_by_tier()["nvme"]
        assert on_disk > 100_000
        staged = store._staging._buffer.numel()
        assert staged < 2000, f"{staged} bytes were copied into memory, {on_disk} are on disk"
        run.backward(1)

        def finish() -> None:
            run.finish()
            stepped.set()

        thread = threading.Thread(target=finish)
        thread.start()
        assert not stepped.wait(0.3)
        may_write.set()
        thread.join(20)
        assert stepped.is_set()
        store.wait()
    finally:
        checkpoint_writer.write_safetensors = original
    twin.step(1)
    hold_equal(run, twin, "after the step that waited")
    store.load(run.parts)
    again = begin(3, "none", tmp_path)
    again.step(0)
    run.sharded.owner.zero_grad()
    hold_equal(run, again, "what was saved")
    run.close()


@distributed(2)
def test_a_checkpoint_of_state_on_disk_is_exported(tmp_path: Path) -> None:
    run = begin(3, "nvme", tmp_path)
    for step in range(2):
        run.step(step)
    CheckpointStore(tmp_path / "steps").save(2, run.parts)
    values = {name: full_tensor(p, master=True) for name, p in run.model.named_parameters()}
    if dist.get_rank() == 0:
        export_hf(CheckpointStore(tmp_path / "steps").path(2), tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], value) for name, value in values.items())
    run.close()


def mapped_kib(volume: Any) -> int:
    """Of the volume's file, in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = Path(volume.path).name in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident pages from /proc")
@pytest.mark.parametrize("block", [True, False])
@distributed(1)
def test_saving_and_loading_leave_no_pages_of_the_file_in_memory(block: bool, tmp_path: Path) -> None:
    run = begin(3, "nvme", tmp_path)
    run.step(0)
    run.store.settle()
    store = CheckpointStore(tmp_path / "steps")
    assert mapped_kib(run.store.volume) == 0
    store.save(1, run.parts, block=block)
    store.wait()
    assert mapped_kib(run.store.volume) == 0
    store.load(run.parts)
    found = mapped_kib(run.store.volume)
    assert found == 0, f"{found} KiB"
    full_tensor(next(run.model.parameters()), master=True)
    assert mapped_kib(run.store.volume) > 0  # a plain look does bring pages
    run.close()
