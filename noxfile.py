"""Every command of the repository: `quickstart` and `tests` are the README's, `nox -l` lists the rest."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036 - the machine decides which Python runs nox
    sys.exit(f"this repository needs Python 3.11 or newer; nox runs on {sys.version.split()[0]}")

import nox

ROOT = Path(__file__).resolve().parent
DIST = ROOT / "dist"
SETTINGS = nox.project.load_toml(ROOT / "pyproject.toml")
GROUPS: dict[str, list[str]] = SETTINGS["dependency-groups"]
PROJECTS: dict[str, dict[str, Any]] = {
    path.parent.name: nox.project.load_toml(path)["project"]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
TORCH = os.environ.get("DS_TORCH", SETTINGS["tool"]["ds"]["torch"])

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False
nox.options.sessions = ["quickstart", "tests"]
# Without .pyc files every process compiles torch's 1,500 modules again; PYTHONPATH hides what wheels lack.
for variable in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH"):
    os.environ.pop(variable, None)


# -- what was run, summed up in the last line --------------------------------------------------------


class Row(NamedTuple):
    """What one session did."""

    name: str
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0


ROWS: list[Row] = []


@atexit.register
def summary() -> None:
    """One row per session that tests, then their sum in pytest's own words: the last line of every run."""
    if not ROWS:
        return
    for row in ROWS:
        counts = f"{row.passed:6} passed {row.skipped:4} skipped {row.failed:4} failed"
        print(f"{row.name:24} {counts} {row.seconds:8.1f} s")
    words = [(sum(r.failed for r in ROWS), "failed"), (sum(r.passed for r in ROWS), "passed")]
    words.append((sum(r.skipped for r in ROWS), "skipped"))
    text = ", ".join(f"{count} {word}" for count, word in words if count or word == "passed")
    print(f"{text} in {sum(r.seconds for r in ROWS):.2f}s")


def gate(function: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
    """A check without tests of its own: when it fails it counts as one failure in the last line."""

    @functools.wraps(function)
    def run(session: nox.Session) -> None:
        try:
            function(session)
        except Exception:
            ROWS.append(Row(function.__name__, failed=1))
            raise

    return run


def run_pytest(session: nox.Session, *args: str) -> None:
    report = ROOT / ".nox" / f"junit-{re.sub(r'[^a-z-]+', '-', session.name)}.xml"
    report.unlink(missing_ok=True)
    try:
        session.run("pytest", f"--junitxml={report}", *args, *session.posargs)
    except Exception:
        row = read_report(session.name, report)
        ROWS.append(row._replace(failed=max(1, row.failed)))  # pytest may fail with no test failing
        raise
    ROWS.append(read_report(session.name, report))


def read_report(name: str, report: Path) -> Row:
    if not report.exists():
        return Row(name, failed=1)
    suite = next(ET.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return Row(name, total - failed - skipped, skipped, failed, float(suite.get("time", 0)))


# -- torch once, our wheels everywhere ----------------------------------------------------------------


def requires(name: str) -> set[str]:
    """The distributions a package declares, without versions."""
    return {re.match(r"[\w.-]+", text)[0].lower() for text in PROJECTS[name]["dependencies"]}


def closure(*names: str) -> list[str]:
    """The ds packages that installing `names` must bring, needed ones first, and no others."""
    found: list[str] = []
    for name in names:
        for needed in sorted(requires(name) & PROJECTS.keys()):
            found += [n for n in closure(needed) if n not in found]
        if name not in found:
            found.append(name)
    return found


def third_party() -> list[str]:
    """Everything the packages declare that is neither ours nor torch."""
    texts = {text for project in PROJECTS.values() for text in project["dependencies"]}
    return sorted(t for t in texts if re.match(r"[\w.-]+", t)[0] not in {"torch", *PROJECTS})


def torch_site(session: nox.Session) -> Path:
    """The site-packages with torch for all sessions: DS_TORCH_SITE, or one environment made on first use."""
    if given := os.environ.get("DS_TORCH_SITE"):
        return Path(given).resolve()
    base = ROOT / ".nox" / "_torch"
    version = "".join(map(str, sys.version_info[:2]))
    stamp = base / f"{re.sub(r'[^A-Za-z0-9.=<>]', '_', TORCH)}-py{version}"
    if not stamp.exists():  # an interrupted install leaves no stamp
        session.log(f"installing {TORCH}, once for all sessions (DS_TORCH, DS_TORCH_SITE: take another)")
        shutil.rmtree(base, ignore_errors=True)
        session.run(sys.executable, "-m", "virtualenv", "-q", str(base), external=True)
        session.run(str(base / "bin" / "python"), "-m", "pip", "install", "-q", TORCH, external=True)
        stamp.touch()
    return next(base.glob("lib/python*/site-packages"))


def torch_layer(session: nox.Session) -> None:
    """Let this environment see the shared torch: installing it costs 20 s and 0.9 GB each time."""
    site = torch_site(session)
    here = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    (here / "_torch_layer.pth").write_text(f"{site}\n")
    session.env["DS_TORCH_SITE"] = str(site)


def torch_pin() -> str:
    """The torch that dist/constraints.txt asks for: the one the sessions run on."""
    if given := os.environ.get("DS_TORCH_SITE"):
        versions = [d.version for d in distributions(path=[given]) if d.metadata["Name"] == "torch"]
        if not versions:
            sys.exit(
                f"DS_TORCH_SITE={given} holds no torch; give the site-packages of an environment with it"
            )
        return f"torch=={versions[0].split('+')[0]}"
    return TORCH


def wheel(name: str) -> str:
    return str(next(DIST.glob(name.replace("-", "_") + "-*.whl")))


def install(session: nox.Session, *requirements: str) -> None:
    """Install built wheels by name, as a user would: the constraints say where they are."""
    torch_layer(session)
    session.install("-q", "-c", str(DIST / "constraints.txt"), *requirements)
    names = [r.split("[")[0] for r in requirements if r.split("[")[0] in PROJECTS]
    # The same version may have new content; `run`, so that `nox -R` does not test old wheels.
    ours = [wheel(name) for name in closure(*names)]
    session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *ours)


def assert_alone(session: nox.Session, package: str) -> None:
    """Fail unless exactly the declared ds packages came with this one."""
    out = session.run("python", "-m", "pip", "list", "--format=json", silent=True, log=False)
    got = {d["name"].lower() for d in json.loads(out.splitlines()[-1])} & PROJECTS.keys()
    if got != set(closure(package)):
        session.error(f"installing {package} brought {sorted(got)}; it declares {closure(package)}")


# -- sessions ------------------------------------------------------------------------------------------


@nox.session(requires=["build"])
def quickstart(session: nox.Session) -> None:
    """Train a small GPT with ZeRO on real text: all GPUs, or two CPU processes. `-- --help`: its flags."""
    install(session, "ds-zero[recipes]", "ds-kernels")
    session.run("ds", "launch", "--nproc", "auto", "-m", "ds_zero.recipes.train_gpt", *session.posargs)


def suites() -> Iterator[str]:
    yield from ("gates", *PROJECTS, "integration")


@nox.session(requires=["build"])
@nox.parametrize("suite", list(suites()), ids=list(suites()))
def tests(session: nox.Session, suite: str) -> None:
    """Every test. `tests(<package>)` has that package alone; `tests(gates)` queues lint, types and docs."""
    if suite == "gates":
        for name in ("lint", "types", "docs"):
            session.notify(name, [])
        session.install("-q", *GROUPS["test"], *GROUPS["lint"], *GROUPS["gates"])
        run_pytest(session, "-q", "tools/tests")
    elif suite == "integration":
        names = [
            f"{n}[recipes]" if "recipes" in p.get("optional-dependencies", {}) else n
            for n, p in PROJECTS.items()
        ]
        install(session, *names, *GROUPS["test"], *GROUPS["integration"])
        run_pytest(session, "-q", "integration-tests")
    else:
        extras = ",".join(SETTINGS["tool"]["ds"]["test_extras"].get(suite, []))
        install(session, f"{suite}[{extras}]" if extras else suite, *GROUPS["test"])
        assert_alone(session, suite)
        run_pytest(session, "-q", f"packages/{suite}/tests")


@nox.session(venv_backend="none", default=False)
def integration(session: nox.Session) -> None:
    """Short for `tests(integration)`: the packages together, and their installation."""
    session.notify("tests(integration)")


@nox.session
@gate
def lint(session: nox.Session) -> None:
    """ruff, and the checks of tools/. `-- --fix` formats and rewrites the generated files."""
    session.install("-q", *GROUPS["lint"])
    fix = "--fix" in session.posargs
    commands = [["ruff", "check", *(["--fix"] if fix else []), "."]]
    commands.append(["ruff", "format", *([] if fix else ["--check"]), "."])
    commands += [["python", f"tools/{tool}.py"] for tool in ("layers", "sizes", "release", "hygiene")]
    commands += [["python", f"tools/{tool}.py", *([] if fix else ["--check"])] for tool in ("rooms", "api")]
    failed = []
    for command in commands:
        try:
            session.run(*command)
        except nox.command.CommandFailed:
            failed.append(" ".join(command))
    if failed:
        session.error("; ".join(failed))


@nox.session
@gate
def types(session: nox.Session) -> None:
    """mypy --strict over every package and the tools."""
    torch_layer(session)
    session.install("-q", *GROUPS["types"], *GROUPS["test"], *third_party())
    session.run("mypy", *session.posargs)


@nox.session
@gate
def docs(session: nox.Session) -> None:
    """The site, into site/. Links, snippets and cross-references that lead nowhere are errors."""
    session.install("-q", *GROUPS["docs"])
    # never -q: it hides the warnings that --strict counts
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
@gate
def build(session: nox.Session) -> None:
    """Wheels and sdists of every package into dist/, and constraints.txt to install them by name."""
    session.install("-q", *GROUPS["build"])
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    for name in PROJECTS:
        with session.chdir(ROOT / "packages" / name):
            session.run("python", "-m", "hatchling", "build", "-d", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.glob("ds_*"))), silent=True)
    lines = [f"{name} @ {Path(wheel(name)).as_uri()}" for name in PROJECTS]
    (DIST / "constraints.txt").write_text("\n".join([*lines, torch_pin(), ""]))


@nox.session(requires=["build"], default=False)
def kernels(session: nox.Session) -> None:
    """Every kernel against its reference, and every Triton kernel compiled for GPUs that need not be here."""
    install(session, "ds-kernels[test]", *GROUPS["test"])
    session.run("ds-kernels", "info")
    session.run("ds-kernels", "cubins")
    run_pytest(session, "-q", "packages/ds-kernels/tests/test_conformance.py")


@nox.session(requires=["build"], default=False)
def bench(session: nox.Session) -> None:
    """`-- packages/ds-zero/benchmarks/step.py [flags]` runs one benchmark; without arguments, lists them."""
    scripts = sorted(
        p for pattern in ("packages/*/benchmarks/*.py", "kernels/*/bench.py") for p in ROOT.glob(pattern)
    )
    if not session.posargs:
        session.log("choose one:\n  " + "\n  ".join(str(p.relative_to(ROOT)) for p in scripts))
        return
    install(session, *PROJECTS)
    session.run("python", *session.posargs)


@nox.session(default=False)
def dev(session: nox.Session) -> None:
    """Make .venv: every package editable, with the tools that test, lint, type and document it."""
    session.run(sys.executable, "-m", "virtualenv", "-q", ".venv", external=True)
    editable = [arg for name in PROJECTS for arg in ("-e", f"packages/{name}")]
    groups = [r for g in ("test", "integration", "lint", "types", "docs") for r in GROUPS[g]]
    python = str(ROOT / ".venv" / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", torch_pin(), *groups, *editable, external=True)
