"""`ds config resolve` and `ds estimate`, through the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_core.cli.main import main

FILE = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": "2", "zero_optimization": {"stage": 2}}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILE))
    return str(path)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_resolve_prints_value_source_and_place(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "resolve", file, "--world", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "gradient_accumulation_steps" in line)
    assert " 2 " in row
    assert "derived: from the batch equation" in row
    assert "Engine(accumulate)" in row
    assert not any("gradient_clipping" in line for line in lines)
    main(["config", "resolve", file, "--all"])
    assert "gradient_clipping" in capsys.readouterr().out


def test_resolve_as_json_with_overrides(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "zero_optimization.stage=3", "--set", "gradient_accumulation_steps=8", "--json"]
    assert main(["config", "resolve", file, "--world", "4", *words]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["plan"]["stage"], made["plan"]["accumulate"]) == (3, 8)
    sources = {row["key"]: row["source"] for row in made["keys"]}
    assert sources["zero_optimization.stage"] == "command line --set zero_optimization.stage"
    assert sources["train_batch_size"] == f"file {file}"


def test_resolve_says_where_a_contradiction_was_written(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--world", "16", "--set", "gradient_accumulation_steps=4"]
    assert main(["config", "resolve", file, *words]) == 2
    text = capsys.readouterr().err
    assert f"train_batch_size 64 (file {file}) = train_micro_batch_size_per_gpu 2 (file {file})" in text
    assert "x gradient_accumulation_steps 4 (command line --set gradient_accumulation_steps)" in text
    assert "x 16 ranks (command line --world), but the right side is 128" in text


def test_resolve_takes_values_for_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": "auto"}')
    words = ["--auto", "train_micro_batch_size_per_gpu=3", "--json"]
    assert main(["config", "resolve", str(path), *words]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["micro_batch_size"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json"], "no config file 'nowhere.json'"),
        (["FILE", "--set", "oops"], "given 'oops'; allowed: KEY=VALUE"),
        (["FILE", "--set", "zero_optimization.stage=4"], "given 4; allowed: 0, 1, 2, 3"),
        (["FILE", "--world", "0"], "--world is 0"),
    ],
)
def test_resolve_errors(
    words: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "resolve", *[file if word == "FILE" else word for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_estimate_reproduces_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--params", "7.5e9", "--ranks", "64"]) == 0
    text = capsys.readouterr().out
    for total in ("120.0 GB", "31.4 GB", "16.6 GB", "1.9 GB"):
        assert total in text
    assert main(["estimate", "--params", "7.5B", "--ranks", "64", "--stage", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [stage["states"] for stage in made["stages"]] == [1_875_000_000]


def test_estimate_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--params", "1000", "--stage", "1", "--json", "--optimizer", "sgd", "--dtype", "fp32"]
    assert main(["estimate", *words]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["states"] == 8000
    words = ["--params", "1K", "--ranks", "2", "--grad-dtype", "fp32", "--largest-unit", "10", "--stage", "3"]
    assert main(["estimate", *words, "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert (stage["grads"], stage["working"]) == (2000, 10 * 8)


def test_estimate_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--params", "7.5B", "--ranks", "64", "--memory-gb", "20"]) == 0
    assert "fits 20.0 GB" in capsys.readouterr().out
    assert main(["estimate", "--params", "7.5B", "--memory-gb", "20", "--stage", "1"]) == 1
    with pytest.raises(SystemExit):
        main(["estimate", "--params", "many"])
    assert "'many'; allowed: a whole number such as 125M" in capsys.readouterr().err
