"""rooms.py and api.py: what they write about a small tree, and the faults they refuse."""

import textwrap

import pytest

import api
import rooms
from repo import Repo

CORE = "packages/ds-core/src/ds_core"

ENGINE = '''"""One training step."""
import functools
from dataclasses import dataclass

LIMIT: int = 3

@dataclass
class Report:
    """What happened."""
    loss: float
    skipped: bool = False
    _private: int = 0

class Engine(Base):
    """A step."""
    def __init__(self, model: Module, *, accumulate: int = 1) -> None: ...
    @property
    def lr(self) -> float: ...
    def step(self) -> Report: ...
    def _hidden(self) -> None: ...
    @classmethod
    def make(cls, text: str) -> Engine: ...

def shard(model: Module, stage: int = 3) -> Module: ...
'''
TABLE = ", ".join(f'"{n}": "ds_core.train.engine"' for n in ("shard", "Engine", "Report", "LIMIT"))
GOOD = {
    f"{CORE}/__init__.py": f'"""The vocabulary."""\n_HOME: dict[str, str] = {{{TABLE}}}\n',
    f"{CORE}/train/engine.py": ENGINE,
}


def test_api_has_a_line_per_name_and_signature(tree):
    expected = """\
        ds_core.Engine(model: Module, *, accumulate: int=1): Base
        ds_core.Engine.lr: float
        ds_core.Engine.step() -> Report
        ds_core.Engine.make(text: str) -> Engine
        ds_core.LIMIT: int
        ds_core.Report
        ds_core.Report.loss: float
        ds_core.Report.skipped: bool = False
        ds_core.shard(model: Module, stage: int=3) -> Module
    """
    assert api.render(Repo(tree(GOOD)), "ds_core") == textwrap.dedent(expected.rstrip(" "))


def test_api_follows_imports_in_init(tree):
    files = {f"{CORE}/__init__.py": '"""V."""\nfrom .mid import shard\nfrom json import loads\n'}
    files |= {
        f"{CORE}/mid.py": "from .low import cut as shard\n",
        f"{CORE}/low.py": "def cut() -> int: ...\n",
    }
    assert api.render(Repo(tree(files)), "ds_core") == "ds_core.shard() -> int\n"


@pytest.mark.parametrize("home", ["ds_core.nowhere", "ds_core"])
def test_api_refuses_a_table_that_leads_nowhere(tree, home):
    files = {f"{CORE}/__init__.py": f'"""V."""\n_HOME = {{"Gone": "{home}"}}\n'}
    with pytest.raises(LookupError, match="correct the table of public names"):
        api.render(Repo(tree(files)), "ds_core")


def test_rooms_names_every_file(tree):
    page = rooms.render(Repo(tree(GOOD | {"kernels/adam/bench.py": '"""How fast."""\n'})))
    assert "| `train/engine.py` | One training step. |" in page
    assert "| `adam/bench.py` | How fast. |" in page
    assert "The vocabulary." in page


@pytest.mark.parametrize("text", ["import json\n", "# a comment\nx = 1\n", '"""\n"""\n'])
def test_rooms_refuses_a_file_without_a_purpose(tree, text):
    findings = list(rooms.find_unnamed(Repo(tree({f"{CORE}/x.py": text}))))
    assert len(findings) == 1
    assert "ds_core/x.py:1" in findings[0]


def test_rooms_lists_what_no_test_imports(tree):
    files = {f"{CORE}/{name}.py": '"""X."""\n' for name in ("a", "b", "c", "d", "e", "f")}
    files[f"{CORE}/__init__.py"] = '"""V."""\n_HOME = {"B": "ds_core.b", "E": "ds_core.e"}\n'
    files["packages/ds-core/tests/test_a.py"] = (
        'import ds_core.a\nfrom ds_core import B\nC = "ds_core.c"\nds_core.E\n'
    )
    files["packages/ds-core/tests/test_f.py"] = ""
    assert list(rooms.find_untested(Repo(tree(files)))) == ["ds_core.d"]


@pytest.mark.parametrize("tool", [api, rooms])
def test_check_fails_when_stale_and_passes_when_written(tree, tool, monkeypatch, capsys):
    root = tree(GOOD)
    (root / "docs").mkdir()
    monkeypatch.setattr(tool, "Repo", lambda: Repo(root))
    assert tool.main(["--check"]) == 1
    assert "nox -s lint -- --fix" in capsys.readouterr().out
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
