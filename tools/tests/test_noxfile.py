"""The sessions: what a package brings, what the last line says, that CI runs what the README says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import repo

pytest.importorskip("nox", reason="the gates session installs nox: `nox -s 'tests(gates)'`")


@pytest.fixture(scope="module")
def loaded() -> ModuleType:
    """The noxfile as a module, once: nox keeps one register of sessions. It prints nothing at exit."""
    spec = importlib.util.spec_from_file_location("the_noxfile", repo.ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atexit.register", lambda function: function)
        patch.setitem(sys.modules, "the_noxfile", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def noxfile(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The noxfile, with nothing run yet."""
    monkeypatch.setattr(loaded, "ROWS", [])
    return loaded


def test_closure_puts_needed_packages_first(noxfile, monkeypatch):
    projects = {
        "ds-core": {"dependencies": ["torch>=2.11", "numpy>=1"]},
        "ds-zero": {"dependencies": ["ds-core>=0.1,<0.2", "torch>=2.11"]},
        "ds-kernels": {"dependencies": ["ninja>=1"]},
    }
    monkeypatch.setattr(noxfile, "PROJECTS", projects)
    assert noxfile.closure("ds-zero") == ["ds-core", "ds-zero"]
    assert noxfile.closure("ds-kernels", "ds-zero") == ["ds-kernels", "ds-core", "ds-zero"]
    assert noxfile.third_party() == ["ninja>=1", "numpy>=1"]


def test_every_package_has_a_suite(noxfile):
    packages = [p.parent.name for p in repo.ROOT.glob("packages/*/pyproject.toml")]
    assert set(noxfile.suites()) == {"gates", "integration", *packages}


REPORT = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10" time="1.5"/></testsuites>'


def test_last_line_sums_all_sessions(noxfile, tmp_path: Path, capsys):
    (tmp_path / "report.xml").write_text(REPORT)
    noxfile.ROWS += [
        noxfile.read_report("a", tmp_path / "report.xml"),
        noxfile.Row("b", passed=6, seconds=2.0),
    ]
    noxfile.summary()
    assert capsys.readouterr().out.splitlines()[-1] == "3 failed, 10 passed, 3 skipped in 3.50s"


def test_session_that_wrote_no_report_failed(noxfile, tmp_path: Path, capsys):
    noxfile.ROWS.append(noxfile.read_report("a", tmp_path / "missing.xml"))
    noxfile.summary()
    assert capsys.readouterr().out.splitlines()[-1] == "1 failed, 0 passed in 0.00s"


def test_nothing_run_says_nothing(noxfile, capsys):
    noxfile.summary()
    assert capsys.readouterr().out == ""


def test_failing_gate_counts(noxfile):
    def lint(session: None) -> None:
        raise RuntimeError("it is wrong")

    with pytest.raises(RuntimeError):
        noxfile.gate(lint)(None)
    assert [noxfile.Row("lint", failed=1)] == noxfile.ROWS


def test_ci_runs_the_command_of_the_readme():
    readme = (repo.ROOT / "README.md").read_text()
    assert "nox -s quickstart" in readme
    assert "nox -s tests" in readme
    script = (repo.ROOT / ".ci" / "run").read_text()
    assert "nox -s tests" in script.splitlines()[-1]
