"""Compiles every Triton kernel for GPUs that are not here, and counts registers, spills and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_kernels.build import SOURCES
from ds_kernels.registry import triton_module

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a Triton kernel, as its module lists it in VARIANTS.

    `signature`: argument -> triton type ("*fp32", "i64", ...), the constant ones "constexpr".
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    fp_fusion: bool = True  # may the compiler make fused multiply-adds? As the launches of the kernel say

    @property
    def label(self) -> str:
        """Which kernel with which types."""
        kinds = " ".join(kind for kind in self.signature.values() if kind.startswith("*"))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__} {kinds} {constants}".strip()


class Cubin(NamedTuple):
    """What came of one variant on one architecture."""

    variant: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    size: int


def families() -> list[str]:
    """Families with Triton kernels."""
    return sorted({path.parent.name for path in SOURCES.glob("*/*_triton.py")})


def compile_all(architectures: Sequence[int] = ARCHITECTURES, only: Sequence[str] = ()) -> Iterator[Cubin]:
    """Compile every variant of every family, or of those in `only`; no GPU is needed.

    Not under TRITON_INTERPRET=1, which turns kernels into Python functions.
    """
    for family in only or families():
        for variant in triton_module(family).VARIANTS:
            for architecture in architectures:
                yield compile_one(variant, architecture)


def compile_one(variant: Variant, architecture: int) -> Cubin:
    """Compile one variant for one architecture (90 is sm_90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {(variant.kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in variant.kernel.arg_names
    }
    source = ASTSource(variant.kernel, signature, constants)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps, "enable_fp_fusion": variant.fp_fusion},
    )
    registers, spilled = _resources(made.asm["cubin"])
    return Cubin(
        variant.label, architecture, registers, spilled, made.metadata.shared, len(made.asm["cubin"])
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack: spills), read from the compiled program."""
    from triton import knobs

    program = Path(knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{program} says nothing about registers: {done.stdout[:300]}")
    return int(found[1]), int(found[2])
