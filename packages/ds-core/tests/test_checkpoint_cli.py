"""`ds checkpoint`: listing, verifying and exporting, their exit codes and JSON."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_core.cli.main import main
from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.export import export_hf, parse_bytes, plan_shards
from ds_core.testing.parts import CutPart, pattern

SHAPES = {"embed.weight": (20, 8), "blocks.0.w": (8, 8), "norm": (8,)}


def ds(*words: object) -> int:
    return main(["checkpoint", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "run")
    for step in (1, 2):
        model = CutPart(SHAPES, seed=step, values={"tied": {"head.weight": "embed.weight"}})
        optimizer = CutPart({f"{name}/m": shape for name, shape in SHAPES.items()}, seed=step)
        store.save(step, {"model": model, "optimizer": optimizer}, {"epoch": step})
    return tmp_path / "run"


def test_ls_lists_steps_then_tensors(run: Path, capsys: pytest.CaptureFixture[str]):
    assert ds("ls", run) == 0
    assert "2 <- latest" in capsys.readouterr().out
    assert ds("ls", run, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["latest"], row["parts"]) for row in rows] == [
        (1, False, {"model": 3, "optimizer": 3}),
        (2, True, {"model": 3, "optimizer": 3}),
    ]
    assert ds("ls", run / "step-00000001", "--json") == 0
    step = json.loads(capsys.readouterr().out)
    assert step["user"] == {"epoch": 1}
    assert step["tensors"][0] == {
        "part": "model",
        "name": "embed.weight",
        "dtype": "float32",
        "shape": [20, 8],
        "boxes": 1,
    }
    assert ds("ls", run, "--step", 2) == 0
    assert "blocks.0.w/m" in capsys.readouterr().out


def test_verify_finds_a_flipped_byte(run: Path, capsys: pytest.CaptureFixture[str]):
    assert ds("verify", run) == 0
    assert capsys.readouterr().out.count("whole") == 2
    shard = next((run / "step-00000002").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x10
    shard.write_bytes(data)
    assert ds("verify", run, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["ok"] for row in found] == [True, False]
    assert shard.name in found[1]["faults"][0]
    assert ds("verify", run, "--step", 1) == 0
    assert ds("export", run, run.parent / "out") == 1
    assert not (run.parent / "out").exists()


def test_export_writes_what_hugging_face_reads(run: Path, capsys: pytest.CaptureFixture[str]):
    config = run.parent / "config.json"
    config.write_text(json.dumps({"model_type": "tiny"}))
    out = run.parent / "out"
    assert ds("export", run, out, "--dtype", "bf16", "--config", config) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {*SHAPES, "head.weight"}
    for name, shape in SHAPES.items():
        assert torch.equal(tensors[name], pattern(name, shape, torch.float32, 2).bfloat16())
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])
    assert json.loads((out / "config.json").read_text()) == {"model_type": "tiny", "dtype": "bfloat16"}
    assert ds("export", run, out) == 2
    assert "not empty" in capsys.readouterr().err


def test_export_in_shards_and_without_tied_names(run: Path):
    step, out = run / "step-00000001", run.parent / "out"
    export_hf(step, out, config={"tie_word_embeddings": True}, max_shard_bytes=700)
    listing = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(listing["weight_map"]) == set(SHAPES)
    assert listing["metadata"]["total_size"] == 4 * (160 + 64 + 8)
    for name, file in listing["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], pattern(name, SHAPES[name], torch.float32, 1))
    assert len(set(listing["weight_map"].values())) == 2


def test_wrong_requests_are_one_line_and_exit_code_two(run: Path, capsys: pytest.CaptureFixture[str]):
    for words, said in [
        (("ls", run / "nowhere"), "is not a directory"),
        (("ls", run.parent), "no complete checkpoint"),
        (("verify", run, "--step", 7), "no complete step 7"),
        (("export", run, run.parent / "o", "--dtype", "int3"), "dtype 'int3'; allowed"),
        (("export", run, run.parent / "o", "--part", "nope"), "no part 'nope'"),
        (("export", run, run.parent / "o", "--max-shard-size", "much"), "size 'much'"),
        (("export", run, run.parent / "o", "--config", run / "none.json"), "none.json"),
    ]:
        assert ds(*words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_shard_plans_and_sizes():
    assert plan_shards({"a": 5, "b": 5, "c": 11, "d": 1}, 10) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards({}, 10) == [[]]
    assert [parse_bytes(text) for text in ("12", "1.5kB", "2 GiB", "7b")] == [12, 1500, 2 << 30, 7]
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        plan_shards({"a": 1}, 0)
