"""How Python calls a family's compiled library: dtype codes, instruction sets, pointers, outcomes."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Codes of sources/common/abi.h, by position.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("auto", "scalar", "avx2", "avx512", "neon")
NO_DTYPE = len(DTYPES)
_STATUS = {1: "bad argument", 2: "this processor has no such instruction set", 3: "out of memory"}


@dataclass(frozen=True)
class Options:
    """What may be asked of a library besides its functions."""

    isa: str = "auto"

    def __post_init__(self) -> None:
        if self.isa not in ISAS:
            raise ValueError(
                f"DS_KERNELS_ISA={self.isa!r}: instruction set not known; allowed are {', '.join(ISAS)}"
            )

    @classmethod
    def from_environment(cls) -> Options:
        """DS_KERNELS_ISA, or the best that the processor has."""
        return cls(os.environ.get("DS_KERNELS_ISA") or "auto")


class Native:
    """A family's loaded library, and the instruction set that its functions are to use.

    Raises: ValueError for an instruction set that this processor has not.
    """

    def __init__(self, handle: ctypes.CDLL, options: Options | None = None) -> None:
        wanted = (options or Options()).isa
        self.handle = handle
        self.isa_code: int = handle.ds_best_isa() if wanted == "auto" else ISAS.index(wanted)
        self.isa = ISAS[self.isa_code]
        if not handle.ds_has_isa(self.isa_code):
            raise ValueError(f"instruction set {self.isa}: {_STATUS[2]}; it has {', '.join(self.isas())}")

    def isas(self) -> list[str]:
        """The instruction sets that this processor has, slowest first."""
        return [isa for code, isa in enumerate(ISAS) if code and self.handle.ds_has_isa(code)]

    def function(self, name: str, *argtypes: Any) -> Callable[..., None]:
        """A function of the library that returns a status; called without the interpreter's lock.

        Raises: RuntimeError for a status that says no; a caller's mistake was a ValueError before.
        """
        run = getattr(self.handle, name)
        run.argtypes, run.restype = list(argtypes), ctypes.c_int

        def call(*args: Any) -> None:
            status = run(*args)
            if status:
                raise RuntimeError(f"{name} returned {status}: {_STATUS.get(status, 'unknown')}")

        return call


def pointers(tensors: Iterable[Tensor]) -> array[int]:
    """Their addresses; keep the array while its buffer is in use."""
    return array("q", [tensor.data_ptr() for tensor in tensors])


def address(values: array[Any] | None) -> int | None:
    """Where an array's elements are."""
    return None if values is None else values.buffer_info()[0]


def code(dtype: torch.dtype | None) -> int:
    """The dtype as abi.h numbers it; None is kNone."""
    return NO_DTYPE if dtype is None else DTYPES.index(dtype)


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that memory of these was changed behind its back."""
    torch.autograd.graph.increment_version(tensors)
