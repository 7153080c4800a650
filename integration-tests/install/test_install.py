"""Each package alone, installed from its wheel: what comes with it, and how quiet and quick its import is."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
IMPORT_BUDGET = 0.25  # seconds on top of torch's own import


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(dist: Distribution) -> set[str]:
    """The distributions this one asks for when no extra is asked for."""
    texts = [text for text in dist.requires or [] if "extra ==" not in text]
    return {normal(re.match(r"[\w.-]+", text)[0]) for text in texts}


@pytest.mark.parametrize("package", PACKAGES)
def test_only_what_is_declared_comes(environment: Callable[[str], Path], package: str):
    """Of ours exactly the declared packages; of others nothing that no one of the installed asks for."""
    site = next(environment(package).glob("lib/python*/site-packages"))
    came = {normal(d.metadata["Name"]): d for d in distributions(path=[str(site)])}
    wanted, queue = set(), [package]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += needs(came[name]) if name in came else []
    ours = {name for name in came if name in PACKAGES}
    assert ours == wanted & set(PACKAGES)
    assert came.keys() <= wanted
    assert not {n for n in came if n.startswith("nvidia")}, "another torch was installed"


@pytest.mark.parametrize("what", ["package", "modules"])
@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_quiet(probe: Callable[..., dict], package: str, what: str):
    """Importing the package, or each of its modules, prints, starts, writes and initialises nothing."""
    seen = probe(package, what)
    assert seen["printed"] == ""
    assert seen["left"] == []
    assert seen["after"] == seen["before"]
    assert not seen["cuda"]
    assert not seen["group"]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_quick(probe: Callable[..., dict], package: str):
    seconds = [probe(package, "package")["seconds"] for _ in range(3)]
    assert statistics.median(seconds) < IMPORT_BUDGET, f"import {package} after torch took {seconds}"


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_the_package_and_nothing_else(package: str):
    wheel = next(DIST.glob(f"{package.replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folder = package.replace("-", "_")
    assert {n.split("/")[0].split("-")[0] for n in names} == {folder}
    assert f"{folder}/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if "__pycache__" in n or "/tests/" in n]


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_from_sdist_is_the_same_bytes(tmp_path: Path, package: str):
    """Builds are reproducible, and the sdist lacks nothing the wheel has."""
    stem = package.replace("-", "_")
    shutil.unpack_archive(next(DIST.glob(f"{stem}-*.tar.gz")), tmp_path)  # tarfile's filter: not in 3.11.0-3
    source = next(tmp_path.glob(f"{stem}-*"))
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    built = next((tmp_path / "out").glob("*.whl"))
    assert built.read_bytes() == (DIST / built.name).read_bytes()


def test_report_shows_the_kernels():
    """`ds report`, of ds-core, with the section that ds-kernels adds by name."""
    command = [sys.executable, "-m", "ds_core.cli.main", "report", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = json.loads(done.stdout)["kernels"]
    assert {"op", "device", "implementation", "used", "why"} == set(rows[0])
    used = {row["op"]: row["implementation"] for row in rows if row["used"]}
    assert "native" in used.values()
    assert {row["op"] for row in rows} == set(used)
