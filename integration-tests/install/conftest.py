"""An environment per package: its wheel from dist/, what it declares, and the torch of this run."""

import json
import os
import subprocess
import sys
import tomllib
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
            layer = os.environ.get("DS_TORCH_SITE", str(Path(torch.__file__).parents[1]))
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


def project(package: str) -> dict[str, object]:
    text = (ROOT / "packages" / package / "pyproject.toml").read_text()
    table: dict[str, object] = tomllib.loads(text)["project"]
    return table


@pytest.fixture
def probe(environment: Callable[[str], Path], tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Run the probe in a package's environment with an empty home; what it saw, printed and left behind."""

    def run(package: str, what: str) -> dict[str, object]:
        places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
        for place in places.values():
            place.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "PYTHON", "DS_"))}
        env |= {name: str(places[name]) for name in ("HOME", "TMPDIR")}
        python = str(environment(package) / "bin" / "python")
        script = Path(__file__).with_name("probe.py")
        result = tmp_path / "result.json"
        command = [python, str(script), package.replace("-", "_"), what, str(result)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=places["cwd"], timeout=120
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(result.read_text())
        left = sorted(str(p) for place in places.values() for p in place.rglob("*"))
        return seen | {"printed": done.stdout + done.stderr, "left": left}

    return run
