"""An environment per package: its wheel from dist/, what it declares, and the torch of this run."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`environment("ds-zero")` is the folder of an environment with that package, made once."""
    if not (DIST / "constraints.txt").exists():
        pytest.skip("dist/ is empty: `nox -s build` fills it, and `nox -s integration` does so first")
    made: dict[str, Path] = {}

    def make(package: str) -> Path:
        if package not in made:
            folder = tmp_path_factory.mktemp(package)
            venv.EnvBuilder(symlinks=True).create(folder)
            layer = Path(os.environ.get("DS_TORCH_SITE", Path(torch.__file__).parents[1])).resolve()
            (site_packages(folder) / "_torch_layer.pth").write_text(f"{layer}\n")
            pip(folder, "install", "-c", str(DIST / "constraints.txt"), package)
            made[package] = folder
        return made[package]

    return make


def site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"))


def pip(folder: Path, *args: str) -> str:
    """Run this environment's pip for another one, which has none of its own."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder),
        "-q",
        "--disable-pip-version-check",
        *args,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


Probe = Callable[..., dict[str, object]]


@pytest.fixture
def probe_in(tmp_path: Path) -> Probe:
    """`probe_in(python, module, what)` runs probe.py with an empty home: what it saw and left."""
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
    script, result = Path(__file__).with_name("probe.py"), tmp_path / "result.json"

    def run(python: str, module: str, what: str, path: str = "") -> dict[str, object]:
        for place in places.values():
            place.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "PYTHON", "DS_"))}
        env |= {"HOME": str(places["HOME"]), "TMPDIR": str(places["TMPDIR"]), "PYTHONPATH": path}
        command = [python, str(script), module, what, str(result)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=places["cwd"], timeout=120
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(result.read_text())
        left = sorted(str(p) for place in places.values() for p in place.rglob("*"))
        after_torch = [text.partition("-- torch is imported --\n")[2] for text in (done.stdout, done.stderr)]
        return seen | {"printed": "".join(after_torch), "left": left}

    return run


@pytest.fixture
def probe(environment: Callable[[str], Path], probe_in: Probe) -> Probe:
    """`probe(package, what)`: the same, in the package's own environment."""

    def run(package: str, what: str) -> dict[str, object]:
        python = str(environment(package) / "bin" / "python")
        return probe_in(python, package.replace("-", "_"), what)

    return run
