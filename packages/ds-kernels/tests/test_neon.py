"""The NEON bodies on this machine: cross-compiled and run under an emulator, against the scalar ones."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from ds_kernels import build

FLAGS = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]


@pytest.mark.parametrize(
    ("families", "check", "combinations"),
    [(["optim"], "neon_check.cpp", 648), (["quant", "bits"], "neon_quant_check.cpp", 42)],
    ids=["optim", "quant and bits"],
)
def test_neon_writes_the_bits_of_scalar(
    tmp_path: Path, families: list[str], check: str, combinations: int
) -> None:
    native = platform.machine() == "aarch64"
    compiler = shutil.which("g++" if native else "aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64")
    if compiler is None or not (native or emulator):
        pytest.skip(
            "needs an Arm machine, or aarch64-linux-gnu-g++ and qemu-aarch64 "
            "(Debian: apt install g++-aarch64-linux-gnu qemu-user)"
        )
    program = tmp_path / "neon_check"
    folders = [build.SOURCES / family for family in families]
    sources = [Path(__file__).with_name(check), *(p for f in folders for p in sorted(f.glob("*_cpu.cpp")))]
    include = [f"-I{path}" for path in (*folders, build.SOURCES / build.COMMON)]
    subprocess.run(
        [compiler, *FLAGS, "-static", *include, *map(str, sources), "-o", str(program)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    command = [str(program)] if native else [str(emulator), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{combinations} combinations, 0 differ\n")
