"""The recipe's command line: every flag documented, every contradiction refused by name."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from ds_zero.recipes.flags import Settings, build_parser, flag, parse

README = Path(__file__).parents[1] / "README.md"


def test_every_setting_is_a_documented_flag() -> None:
    help_text = build_parser().format_help()
    readme = README.read_text(encoding="utf-8")
    for field in fields(Settings):
        assert re.search(rf"{flag(field.name)}\b", help_text), field.name
        assert f"`{flag(field.name)}" in readme, f"{flag(field.name)} is missing in {README.name}"


def test_defaults_and_typed_values() -> None:
    parsed = parse(["--stage", "2", "--model-size", "2m", "--plain"])
    settings = parsed.settings
    assert parsed.saved is None
    assert parsed.typed == {"stage", "model_size", "plain"}
    assert (settings.stage, settings.model_size, settings.plain, settings.seq) == (2, "2m", True, 256)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "4"], r"--stage 4: ZeRO has stages 1 .*, 2 .* and 3"),
        (["--switch-stage", "7"], r"--switch-stage 7: ZeRO has stages"),
        (["--model-size", "11m"], r"--model-size 11m: allowed are 100k, 2m, 10m"),
        (["--dtype", "fp8"], r"--dtype fp8: allowed are auto, float32"),
        (["--optimizer", "lion"], r"--optimizer lion: allowed are adamw"),
        (["--tokenizer", "words"], r"--tokenizer words: allowed are bpe, bytes"),
        (["--batch", "0"], r"--batch 0: give a number above 0"),
        (["--clip", "-1"], r"--clip -1.0: give 0 or more"),
        (["--switch-at", "1.5"], r"--switch-at 1.5: .*below 1|--switch-at 1.5: .*up to but not including 1"),
        (["--vocab", "100"], r"--vocab 100: .*at least 257"),
        (["--data", "/no/such/folder"], r"--data /no/such/folder: there is no such file"),
        (["--config", "/no/such.json"], r"--config /no/such.json: there is no such file"),
        (["--resume", "/no/such/run"], r"--resume /no/such/run: no run.json in it"),
        (["--steps", "5", "--minutes", "2"], r"--steps 5 and --minutes 2"),
        (["--steps", "5", "--warmup", "9"], r"--warmup 9 is more than --steps 5"),
        (["--switch-at", "0", "--switch-stage", "1"], r"--switch-at"),
        (["--staeg", "3"], r"unrecognized arguments: --staeg"),
        (["--steps", "many"], r"argument --steps: invalid int value: 'many'"),
    ],
)
def test_bad_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        parse(argv)


def test_config_file_and_flags_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{}")
    assert parse(["--config", str(file), "--steps", "3"]).settings.config == file
    with pytest.raises(ValueError, match=r"--lr and --config .*'optimizer\.params\.lr'"):
        parse(["--config", str(file), "--lr", "0.1"])


def test_a_resumed_run_keeps_what_its_checkpoint_depends_on(tmp_path: Path) -> None:
    first = parse(["--model-size", "2m", "--stage", "3", "--seq", "64", "--stop-after", "5"]).settings
    (tmp_path / "run.json").write_text(json.dumps({"settings": first.as_json()}))
    parsed = parse(["--resume", str(tmp_path), "--stage", "1", "--model-size", "2m"])
    again = parsed.settings
    assert parsed.saved is not None
    assert (again.model_size, again.seq, again.stage) == ("2m", 64, 1)
    assert again.stop_after is None
    with pytest.raises(ValueError, match=r"--seq 128 contradicts --resume .*trained with 64"):
        parse(["--resume", str(tmp_path), "--seq", "128"])
    with pytest.raises(ValueError, match=r"--out .* holds a run already"):
        parse(["--out", str(tmp_path)])
