"""`ds io bench` as people type it: the table, the file, fio beside it, and one line when it cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ds_core.cli import main as cli
from ds_kernels.aio import AsyncIO
from ds_offload import io_settings
from ds_offload.io_bench import IoSetting
from ds_offload.io_command import add_parser, contend_fio, parse_bytes

MIB = 1 << 20
QUICK = [
    "--seconds",
    "0.3",
    "--bytes",
    "8M",
    "--block-sizes",
    "64K",
    "--queue-depths",
    "2,4",
    "--threads",
    "1",
]
FIO = """#!{python}
import json, os, sys
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
assert os.path.getsize(options["filename"]) >= int(options["offset"]) + int(options["size"])
if {fails}:
    sys.exit("fio: no such engine")
one = {{"io_bytes": 3_000_000_000, "runtime": 1000}}
print("a warning", json.dumps({{"jobs": [{{options["rw"]: one}}] * int(options["numjobs"])}}))
"""


@pytest.fixture
def no_fio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def put_fio(monkeypatch: pytest.MonkeyPatch, folder: Path, *, fails: bool = False) -> None:
    program = folder / "fio"
    program.write_text(FIO.format(python=sys.executable, fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_line_in_the_list_of_commands_is_that_of_the_command() -> None:
    shown: list[Any] = []

    class Subparsers:
        def add_parser(self, name: str, **settings: Any) -> Any:
            shown.append((name, settings["help"]))
            return cli.argparse.ArgumentParser()

    add_parser(Subparsers())
    assert shown == [("io", cli._ELSEWHERE["io"][1])]


def test_a_table_a_file_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fio: None
) -> None:
    assert cli.main(["io", "bench", str(tmp_path), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "write GB/s" in out
    assert "no fio beside it: it is not installed" in out
    assert f"wrote {tmp_path}/ds_io.json" in out
    assert os.listdir(tmp_path) == ["ds_io.json"]
    AsyncIO(**io_settings(tmp_path)).close()


def test_json_to_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk, out = tmp_path / "disk", tmp_path / "best.json"
    disk.mkdir()
    assert (
        cli.main(["io", "bench", str(disk), *QUICK, "--engines", "python", "--out", str(out), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert io_settings(out)["engine"] == "python"
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/such/place"], "no such folder"),
        ([__file__], "is a file: allowed are folders"),
        ([".", "--seconds", "-1"], "seconds=-1.0: allowed"),
        ([".", "--bytes", "0"], "bytes=0: allowed"),
        ([".", "--bytes", "90000T"], "bytes are free"),
        ([".", "--threads", "0"], "threads=(0,): allowed"),
        ([".", "--out", "/no/such/place/x.json"], "there is no folder /no/such/place"),
        ([".", "--engines", "warp", *QUICK], "engine='warp': allowed are"),
    ],
)
def test_one_line_when_it_cannot_be(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["io", "bench", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ds io: ")
    assert said in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_numbers_of_bytes() -> None:
    assert [parse_bytes(text) for text in ("4096", "64K", "1.5m", "2G")] == [4096, 65536, 3 << 19, 2 << 30]
    for text in ("", "M", "many", "1X", "1e400M"):
        with pytest.raises(cli.argparse.ArgumentTypeError, match="a number of bytes, as"):
            parse_bytes(text)


def test_fio_at_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_fio(monkeypatch, tmp_path)
    found = contend_fio(tmp_path, IoSetting("io_uring", MIB, 8, 2), 8 * MIB, 1.0)
    assert (found.engine, found.why) == ("io_uring", "")
    assert found.rates == {"write": 6e9, "read": 6e9}  # of two jobs
    assert contend_fio(tmp_path, IoSetting("threads", MIB, 4, 4), 8 * MIB, 1.0).engine == "psync"
    assert os.listdir(tmp_path) == ["fio"]


def test_fio_that_fails_or_cannot_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_fio(monkeypatch, tmp_path, fails=True)
    setting = IoSetting("libaio", MIB, 8, 2)
    assert contend_fio(tmp_path, setting, 8 * MIB, 1.0).why == "it failed: fio: no such engine"
    assert "less than a block for each of 2 jobs" in contend_fio(tmp_path, setting, MIB, 1.0).why


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    # Whoever started the tests in the background has made them, and what they start, deaf to interrupts.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from ds_core.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "io", "bench", str(tmp_path), "--seconds", "100"]
    running = subprocess.Popen([*command, "--bytes", "8M", "--block-sizes", "64K", "--queue-depths", "4"])
    try:
        deadline = time.monotonic() + 60
        while not any(
            "(deleted)" in os.readlink(f) for f in links_of(running.pid) if str(tmp_path) in os.readlink(f)
        ):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    finally:
        running.kill()
        running.wait()
    assert os.listdir(tmp_path) == []


def links_of(pid: int) -> list[str]:
    """The open files of a process, as far as they can be read now."""
    folder = f"/proc/{pid}/fd"
    return [f"{folder}/{name}" for name in os.listdir(folder) if os.path.islink(f"{folder}/{name}")]
