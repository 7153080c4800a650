"""Triton kernels compile for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ds_kernels import cubins

TOY = """
import triton, triton.language as tl
from ds_kernels.cubins import Variant, compile_one

@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

print(compile_one(Variant(add_one, {"x": "*fp32", "y": "*bf16", "n": "i32"}, {"BLOCK": 1024}), 90))
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_kernel_compiles(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"  # triton reads the source of what it compiles
    script.write_text(TOY)
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    assert "variant='add_one *fp32 *bf16 BLOCK=1024', architecture=90, registers=" in done.stdout
    assert "spilled_bytes=0" in done.stdout


def test_every_kernel_compiles_for_three_architectures() -> None:
    done = run("-m", "ds_kernels.cli", "cubins")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    families = cubins.families()
    for architecture in cubins.ARCHITECTURES:
        assert done.stdout.count(f"sm_{architecture} ") >= len(families)


def test_interpreted_kernels_cannot_be_compiled() -> None:
    done = run("-m", "ds_kernels.cli", "cubins", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it" in done.stdout
