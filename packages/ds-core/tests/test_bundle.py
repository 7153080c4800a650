"""A bug report's bundle holds what helps, none of the planted secrets, and replaces no file."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path

import pytest
import torch

from ds_core.cli.bundle import KEPT, Cleaner, read_tail
from ds_core.cli.main import main

PEM = "RSA PRIVATE" + " KEY"
SECRETS = {
    "MY_TOKEN": "tok-3f9a77c1",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOp",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "DB_PASSWORD": "correct horse battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE",
    "DATABASE_URL": "postgres://admin:hunter2hunter2@db.example/x",
    "SOME_HARMLESS_NAME": "nobody-need-know-this",
    "NCCL_AUTH_TOKEN": "nccl-very-secret",
    "DS_PRIVATE_KEY": "ds-very-secret",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HOME", "/people/somebody")
    config = {
        "train_batch_size": 8,
        "comet": {"enabled": False, "api_key": "comet-key-of-mine", "workspace": "w"},
        "path": f"/people/somebody/data?x={SECRETS['MY_TOKEN']}",
        "tokens": 4096,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "train.log").write_text(
        "old line\n" * 500
        + "Authorization: Bearer abcdefghijklmnop\n"
        + f"login with {SECRETS['DB_PASSWORD']}\n"
        + "password=hunter3hunter3, next=1\n"
        + "GET https://user:pa55w0rd55@host/path\n"
        + "key sk-aaaaaaaaaaaaaaaaaaaa used\n"
        + "step 12: loss 3.5\n"
    )
    return tmp_path


def read(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_bundle_has_everything_but_secrets(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = planted / "out.zip"
    words = ["report", "--bundle", str(path), "--config", str(planted / "ds.json")]
    assert main([*words, "--log", str(planted / "train.log"), "--lines", "50"]) == 0
    assert "look through it" in capsys.readouterr().out
    found = read(path)
    assert set(found) == {
        *("README.txt", "report.txt", "report.json", "environment.json", "packages.txt"),
        *("config/ds.json", "logs/0-train.log"),
    }
    everything = "\n".join(found.values())
    for name, value in SECRETS.items():
        assert value not in everything, name
    for value in ("comet-key-of-mine", "hunter", "pa55w0rd55", "abcdefghijklmnop", "sk-aaaa", "somebody"):
        assert value not in everything
    environment = json.loads(found["environment.json"])
    assert environment["NCCL_DEBUG"] == "INFO"
    assert set(environment) <= KEPT
    assert not set(environment) & SECRETS.keys()
    assert json.loads(found["report.json"])["versions"]["torch"] == torch.__version__
    assert f"torch=={torch.__version__}" in found["packages.txt"]
    config = json.loads(found["config/ds.json"])
    assert config["train_batch_size"] == 8
    assert config["comet"] == {"enabled": False, "api_key": "(removed)", "workspace": "w"}
    assert config["tokens"] == 4096
    assert config["path"].startswith("~/data")
    log = found["logs/0-train.log"].splitlines()
    assert len(log) == 50
    assert log[-1] == "step 12: loss 3.5"
    assert "next=1" in found["logs/0-train.log"]


def test_nothing_is_replaced_and_nothing_is_half_written(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planted / "out.zip"
    path.write_text("mine")
    assert main(["report", "--bundle", str(path)]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert path.read_text() == "mine"
    other = planted / "other.zip"
    assert main(["report", "--bundle", str(other), "--log", str(planted / "no.log")]) == 2
    assert "no.log" in capsys.readouterr().err
    assert not other.exists()
    assert main(["report", "--log", str(planted / "train.log")]) == 2
    assert "add --bundle" in capsys.readouterr().err
    assert main(["report", "--bundle", str(other), "--lines", "0"]) == 2


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("token: abc123xyz", "token: (removed)"),
        ('{"api_key": "abc", "b": 1}', '{"api_key": (removed), "b": 1}'),
        ("tokenizer: gpt2, tokens=4096", "tokenizer: gpt2, tokens=4096"),
        ("hf-token=abc my.secret.thing = 'a b'", "hf-token=(removed) my.secret.thing = (removed)"),
        ("https://me:pass@h/x https://h/x:1@2", "https://(removed)@h/x https://h/x:1@2"),
        ("bearer aaaaaaaaaaaa", "bearer (removed)"),
        (f"-----BEGIN {PEM}-----\nabc\n-----END {PEM}-----", "(removed)"),
        ("12 tokens of 4096", "12 tokens of 4096"),
        ("/people/me/x /people/mean/x", "~/x /people/mean/x"),
        ("value shhh-quiet ok", "value (removed) ok"),
        ("short abc ok", "short abc ok"),
    ],
)
def test_what_is_removed_from_text(text: str, clean: str) -> None:
    cleaner = Cleaner({"HOME": "/people/me", "X_TOKEN": "shhh-quiet", "Y_TOKEN": "abc", "NAME": "tokens"})
    assert cleaner(text) == clean


def test_the_tail_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff" * 10 + b"x" * (3 << 20) + b"\none\ntwo\n")
    assert read_tail(path, 2) == "one\ntwo\n"
    long = read_tail(path, 10)
    assert len(long) <= 1 << 20
    began = time.perf_counter()
    assert Cleaner({})(long) == long
    assert time.perf_counter() - began < 5.0  # a search from every place of a line would take an hour
