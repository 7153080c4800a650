"""The `ds` command: quick help, exit codes, and errors in one line."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ds_core import __version__
from ds_core.cli import main as cli


def run(*args: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ds_core.cli.main import main; r = main(sys.argv[1:]);"
    code += "sys.stderr.write('torch' if 'torch' in sys.modules else ''); sys.exit(r)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, env=env, check=False
    )


def test_help_lists_all_commands_without_torch() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (2, "")
    for name in ("launch", "report", "estimate", "config", "checkpoint"):
        assert f"\n    {name} " in done.stdout or f"\n    {name}\n" in done.stdout


def test_launch_needs_no_torch(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("")
    done = run("launch", "--nproc", "1", "--logs", str(tmp_path), str(script))
    assert (done.returncode, done.stderr) == (0, "")


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ds-core {__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["lauch"])
    assert "invalid choice: 'lauch'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_has_help_and_a_function(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: ds {name}" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    module, help_line = cli._COMMANDS[name]
    import_module(module).add_parser(subparsers)
    [shown] = subparsers._choices_actions
    assert shown.help == help_line, "the line in cli/main.py is not that of the command"


class Plugin:
    """An entry point of a package that is not installed here."""

    def __init__(self, name: str, add_parser: Callable[[Any], None] | None = None) -> None:
        self.name, self.module, self.dist = name, "far_away.command", None
        self._add_parser = add_parser

    def load(self) -> Callable[[Any], None]:
        assert self._add_parser is not None, f"{self.name} was imported and nobody asked for it"
        return self._add_parser


def plug(monkeypatch: pytest.MonkeyPatch, *plugins: Plugin) -> None:
    def found(group: str) -> list[Plugin]:
        assert group == "ds.command"
        return list(plugins)

    monkeypatch.setattr(cli, "entry_points", found)


def test_a_command_of_an_absent_package_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plug(monkeypatch)
    assert cli.main(["io", "bench", "/somewhere"]) == 2
    assert capsys.readouterr().err == "ds io comes with ds-offload: pip install ds-offload\n"
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    cli.main([])
    assert f"{cli._ELSEWHERE['io'][1]} (needs ds-offload)" in " ".join(capsys.readouterr().out.split())


def test_commands_of_packages_are_listed_without_importing_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plug(monkeypatch, Plugin("io"), Plugin("brew"))
    cli.main([])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("io ") and line.endswith(cli._ELSEWHERE["io"][1]) for line in lines)
    assert any(line.startswith("brew ") and line.endswith("from far_away.command") for line in lines)


def test_a_command_of_a_package_runs_like_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(args: argparse.Namespace) -> int:
        raise ValueError(f"no {args.what}")

    def add_parser(subparsers: Any) -> None:
        parser = subparsers.add_parser("brew", help="make something hot")
        parser.add_argument("what")
        parser.set_defaults(func=refuse if len(seen) else lambda args: seen.append(args.what))

    seen: list[str] = []
    plug(monkeypatch, Plugin("brew", add_parser), Plugin("launch", add_parser))  # ours stays ours
    assert cli.main(["brew", "tea"]) == 0
    assert seen == ["tea"]
    assert cli.main(["brew", "coffee"]) == 2
    assert capsys.readouterr().err == "ds brew: no coffee\n"
    assert cli.main(["launch", "no such file.py"]) == 2
    assert "no script 'no such file.py'" in capsys.readouterr().err


def test_an_error_is_one_line_and_debug_shows_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["launch", "no such file.py"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ds launch: no script 'no such file.py' in ")
    assert err.count("\n") == 1
    monkeypatch.setenv("DS_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["launch", "no such file.py"])
