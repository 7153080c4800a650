"""CheckpointStore: any world reads any other's, nothing half-written is ever seen, every failure says why."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.checkpoint_index import DamagedCheckpoint, SaveError, read_index
from ds_core.state.shard import FlatShard
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.parts import CutPart, SteadyPart

SHAPES = {"w": (7, 5), "b": (11,), "deep": (3, 4, 5), "one": (), "none": (0, 4), "embed": (50, 16)}


def save_world(rank: int, world: int, folder: str, step: int, whole: bool, dtype: torch.dtype, block: bool):
    parts = {
        "model": CutPart(SHAPES, rank, world, whole=whole, dtype=dtype, seed=step),
        "optimizer": SteadyPart({f"{n}/exp_avg": s for n, s in SHAPES.items()}, rank, world, seed=step),
        "schedule": CutPart({}, values={"last": 0.1 + step, "names": ["a", "b"], "none": None}),
    }
    handle = CheckpointStore(folder).save(step, parts, {"tokens": 12, "nan": float("inf")}, block=block)
    parts["optimizer"].change()
    for name in SHAPES:
        parts["model"].memory(name).zero_()
    assert handle.result().name == f"step-{step:08d}"


def load_world(rank: int, world: int, folder: str, step: int, whole: bool, dtype: torch.dtype):
    parts = {
        "model": CutPart(SHAPES, rank, world, whole=whole, dtype=dtype),
        "optimizer": CutPart({f"{n}/exp_avg": s for n, s in SHAPES.items()}, rank, world),
        "schedule": CutPart({}),
    }
    user = CheckpointStore(folder).load(parts, step, verify=True)
    assert user == {"tokens": 12, "nan": float("inf")}
    assert parts["model"].wrong(step, dtype) == []
    assert parts["optimizer"].wrong(step, torch.float32) == []
    assert parts["schedule"].values == {"last": 0.1 + step, "names": ["a", "b"], "none": None}


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(("whole", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_two_ranks_save_and_three_and_one_load(tmp_path: Path, whole: bool, dtype: torch.dtype, block: bool):
    args = {"folder": str(tmp_path), "step": 10, "dtype": dtype}
    run_ranks(save_world, 2, **args, whole=whole, block=block)
    run_ranks(load_world, 3, **args, whole=whole)
    load_world(0, 1, str(tmp_path), 10, not whole, dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010"]


def test_four_ranks_load_what_one_saved_and_more_ranks_than_elements(tmp_path: Path):
    save_world(0, 1, str(tmp_path), 3, False, torch.float16, True)
    run_ranks(load_world, 4, folder=str(tmp_path), step=3, whole=False, dtype=torch.float16)
    run_ranks(save_world, 4, folder=str(tmp_path), step=4, whole=False, dtype=torch.float16, block=True)
    load_world(0, 1, str(tmp_path), 4, True, torch.float16)
    assert CheckpointStore(tmp_path).steps() == [3, 4]


def test_each_element_is_written_once_and_whole_tensors_are_spread(tmp_path: Path):
    run_ranks(save_replicas, 4, folder=str(tmp_path))
    index = read_index(tmp_path / "step-00000001")
    boxes = index.parts["model"].tensors["w"].boxes
    assert len(boxes) == len({(b.offsets, b.sizes) for b in boxes})
    sizes: dict[str, int] = {}
    for name, record in index.files.items():
        rank = name.split("-")[1]
        sizes[rank] = sizes.get(rank, 0) + record.bytes
    assert len(sizes) == 4
    assert max(sizes.values()) < 1.5 * min(sizes.values()), sizes
    part = CutPart({"w": (64, 64), **{f"v{i}": (512,) for i in range(8)}})
    CheckpointStore(tmp_path).load({"model": part}, verify=True)
    assert part.wrong(5, torch.float32) == []


def save_replicas(rank: int, world: int, folder: str):
    half = CutPart({"w": (64, 64)}, rank % 2, 2, seed=5)
    whole = CutPart({f"v{i}": (512,) for i in range(8)}, whole=True, seed=5)
    half.shapes, half.held = {**half.shapes, **whole.shapes}, {**half.held, **whole.held}
    CheckpointStore(folder).save(1, {"model": half})


def test_files_are_plain_safetensors(tmp_path: Path):
    save_world(0, 1, str(tmp_path), 2, True, torch.bfloat16, True)
    index = read_index(tmp_path / "step-00000002")
    (name,) = {box.file for box in index.parts["model"].tensors["embed"].boxes}
    with safe_open(tmp_path / "step-00000002" / name, "pt") as file:
        assert torch.equal(
            file.get_tensor("model/embed"),
            CutPart(SHAPES, whole=True, dtype=torch.bfloat16, seed=2).memory("embed"),
        )


def test_dtype_is_converted_and_memory_order_kept(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"m": CutPart({"w": (6, 4)}, whole=True, seed=1)})
    part = CutPart({"w": (6, 4)}, whole=True, dtype=torch.bfloat16)
    part.held["w"] = torch.zeros(4, 6, dtype=torch.bfloat16).t()
    store.load({"m": part})
    assert torch.equal(part.memory("w"), CutPart({"w": (6, 4)}, whole=True, seed=1).memory("w").bfloat16())
    turned = CutPart({"w": (4, 6)}, whole=True, seed=9)
    turned.held["w"] = turned.memory("w").t()
    store.save(2, {"m": turned})
    back = CutPart({"w": (6, 4)}, whole=True)
    store.load({"m": back})
    assert torch.equal(back.memory("w"), turned.memory("w"))


def test_retention_latest_and_replacing_a_step(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    assert (store.steps(), store.latest()) == ([], None)
    for step in (10, 20, 30):
        store.save(step, {"m": CutPart({"w": (4,)}, seed=step)})
    assert (store.steps(), store.latest()) == ([20, 30], 30)
    store.save(20, {"m": CutPart({"w": (4,)}, seed=99)})
    assert (store.steps(), store.latest()) == ([20, 30], 20)
    part = CutPart({"w": (4,)})
    store.load({"m": part})
    assert part.wrong(99, torch.float32) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000030"]
    (tmp_path / "latest").write_text("step-00000777\n")
    assert store.latest() == 30


def test_what_a_crashed_save_left_is_cleaned_and_never_listed(tmp_path: Path):
    left = tmp_path / ".step-00000005.00112233aabbccdd.tmp"
    left.mkdir()
    (left / "shard-00000-000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000006").mkdir()
    store = CheckpointStore(tmp_path)
    assert store.steps() == []
    store.save(7, {"m": CutPart({"w": (4,)}, seed=1)})
    assert not left.exists()
    assert store.steps() == [7]


def test_a_step_that_was_being_replaced_is_put_back(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.save(5, {"m": CutPart({"w": (4,)}, seed=1)})
    os.rename(tmp_path / "step-00000005", tmp_path / ".step-00000005.00112233aabbccdd.old")
    store.save(6, {"m": CutPart({"w": (4,)}, seed=1)})
    assert store.steps() == [5, 6]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nn.Linear, "'type'|a type, which JSON"),
        ({"a": [1, {2: 3}]}, r"m/v\.a\[1\].*key 2"),
        ({1, 2}, "a set"),
        (torch.zeros(2, device="meta"), "m/v.*cannot be saved"),
        (torch.eye(2).to_sparse(), "m/v.*cannot be saved"),
        (torch.zeros(2, dtype=torch.complex128), "complex128.*allowed"),
        (FlatShard(torch.zeros(4), torch.Size([5]), 2), r"\[2, 6\).*\[5\]"),
        (FlatShard(torch.zeros(2), torch.Size([5]), 2), r"m/v: no rank holds elements \[0, 2\) of 5"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, value: object, words: str):
    part, store = CutPart({}, values={"v": value}), CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=words):
        store.save(1, {"m": part})
    assert store.steps() == []
    store.save(2, {"m": CutPart({"w": (4,)}, seed=1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


def damage(path: Path, how: str) -> None:
    shard = next(path.glob("*.safetensors"))
    if how == "flip":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
    elif how == "cut":
        os.truncate(shard, shard.stat().st_size - 4)
    elif how == "gone":
        shard.unlink()
    elif how == "version":
        raw = json.loads((path / "index.json").read_text())
        (path / "index.json").write_text(json.dumps({**raw, "version": 99}))
    elif how == "half index":
        text = (path / "index.json").read_text()
        (path / "index.json").write_text(text[: len(text) // 2])
    elif how == "hole":
        raw = json.loads((path / "index.json").read_text())
        raw["parts"]["model"]["tensors"]["w"]["boxes"].pop()
        (path / "index.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flip", "was changed"),
        ("cut", r"has \d+ bytes, the index says \d+"),
        ("gone", "is missing"),
        ("version", "version 99.*reads version 1"),
        ("half index", "not whole JSON"),
        ("hole", r"model/w of shape \[7, 5\] has 35 elements"),
    ],
)
def test_damage_is_named_before_any_weight_is_touched(tmp_path: Path, how: str, words: str):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": CutPart({"w": (7, 5), "b": (3,)}, seed=1)})
    damage(tmp_path / "step-00000001", how)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    part = CutPart({"w": (7, 5), "b": (3,)})
    with pytest.raises(DamagedCheckpoint, match=words):
        store.load({"model": part})
    assert all(not part.memory(name).any() for name in part.shapes)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_wrong_requests_name_both_sides(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(LookupError, match=r"no complete checkpoint.*steps there: none"):
        store.load({"model": CutPart({"w": (2,)})})
    store.save(1, {"model": CutPart({"w": (7, 5), "b": (3,)}, seed=1)})
    with pytest.raises(LookupError, match=r"step 9 .*steps there: 1"):
        store.load({"model": CutPart({"w": (7, 5)})}, 9)
    with pytest.raises(LookupError, match=r"no part \['opt'\].*\['model'\]"):
        store.load({"opt": CutPart({"w": (7, 5)})})
    part = CutPart({"w": (5, 7), "x": (1,), "b": (3,)})
    with pytest.raises(ValueError, match=r"x: missing.*w: shape \[5, 7\] here, \[7, 5\] in the checkpoint"):
        store.load({"model": part})
    assert not part.memory("b").any()
    careless = CutPart({"w": (7, 5), "b": (3,)})
    careless.held["w"] = torch.zeros(5, 7)
    careless.load_targets = lambda saved: careless.held
    with pytest.raises(ValueError, match=r"model/w has shape \[5, 7\] here and \[7, 5\]"):
        store.load({"model": careless})
    assert not careless.memory("b").any()
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


@distributed(world_size=2)
def test_one_ranks_trouble_is_everyones_error(tmp_path: Path, rank: int, world: int):
    store = CheckpointStore(tmp_path)
    good = CutPart({"w": (64,)}, rank, world, seed=1)
    with pytest.raises(SaveError if rank == 0 else ValueError, match="a set, which JSON"):
        store.save(1, {"m": good if rank == 0 else CutPart({}, values={"v": {1}})})
    with pytest.raises(ValueError, match=r"different steps, by rank: \[5, 6\]"):
        store.save(5 + rank, {"m": good})
    with pytest.raises(ValueError, match=r"m/w is .*\[65\] on rank 1 and .*\[64\] on rank 0"):
        store.save(1, {"m": CutPart({"w": (64 + rank,)}, rank, world, seed=1)})
    with pytest.raises(SaveError, match=r"m/lr is 0 on an earlier rank and 1 on rank 1"):
        store.save(1, {"m": CutPart({"w": (64,)}, rank, world, seed=1, values={"lr": rank})})
    assert store.steps() == []
    store.save(2, {"m": good})
    bad = CutPart({"w": (63,)}, rank, world) if rank else CutPart({"w": (64,)}, rank, world)
    with pytest.raises(ValueError if rank else SaveError, match=r"w: shape \[63\] here, \[64\]"):
        store.load({"m": bad})
    assert not bad.memory("w").any()
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_import_of_the_store_reads_no_disk_and_handles_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = CheckpointStore(tmp_path / "not" / "yet")
    assert not (tmp_path / "not").exists()
    slow = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.2)
        slow(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    handle = store.save(1, {"m": SteadyPart({"w": (4,)}, seed=1)}, block=False)
    assert not handle.done()
    with pytest.raises(TimeoutError, match=r"not done after 0.01 s"):
        handle.result(0.01)
    assert handle.wait(0.01) is False
    store.close()
    assert handle.done()
    assert handle.exception() is None
    assert store.latest() == 1
