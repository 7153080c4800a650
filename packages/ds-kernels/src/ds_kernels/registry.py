"""Which ops there are, and which implementation each of them gets on which device, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast

import torch

from ds_kernels.build import ADVICE, BuildError
from ds_kernels.library import open_library, outlook
from ds_kernels.native import Native, Options

Implementation = Literal["native", "triton", "torch", "reference"]
Function = Callable[..., Any]
NAMESPACE = "ds"
# What is taken on a device, the first that can be had.
ORDER: Mapping[str, tuple[Implementation, ...]] = {
    "cpu": ("native", "torch", "reference"),
    "cuda": ("triton", "torch", "reference"),
}

# family -> the module that defines its ops
FAMILIES = {
    "activation": "ds_kernels.ops.dropout",
    "bits": "ds_kernels.ops.sums",
    "cross_entropy": "ds_kernels.ops.linear_cross_entropy",
    "linear": "ds_kernels.ops.linear",
    "muon": "ds_kernels.ops.muon",
    "norm": "ds_kernels.ops.norm",
    "optim": "ds_kernels.ops.optim",
    "quant": "ds_kernels.ops.quant_reduce",
    "rope": "ds_kernels.ops.rope",
    "softmax": "ds_kernels.ops.softmax",
}
_log = logging.getLogger("ds_kernels")


class KernelUnavailable(RuntimeError):
    """The wanted implementation of a family cannot be had here."""


class Row(NamedTuple):
    """One line of the table: one implementation of an op on a device, whether it is the one used, and why."""

    op: str
    device: str
    implementation: str  # of an op an `Implementation`, of file access an engine
    used: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An op's contract: schema and reference first, fast ones later. Dispatch is torch.library's, not ours.

    `native` and `triton` get what holds the code (the loaded library; the module <family>_triton.py of the
    family's folder) and give the implementation for CPU and for GPU tensors; `torch` maps a device type to
    one made of torch's own fused operators. `backward` and `saves` are what register_autograd takes.
    `bound(args, kwargs, wanted)`: how far every output and every written argument, in that order, may be from
    the reference's, as tensors or numbers; without it all implementations give the same bits.
    """

    name: str
    schema: str  # without the name: "(Tensor(a!)[] params, ...) -> ()"
    family: str  # folder under kernels/
    reference: Function  # runs on any device
    fake: Function  # checks and output shapes only, for tracing
    native: Callable[[Native], Function] | None = None
    triton: Callable[[Any], Function] | None = None
    torch: Mapping[str, Function] = field(default_factory=dict)
    backward: Function | None = None
    saves: Function | None = None
    bound: Function | None = None

    @property
    def op(self) -> str:
        """Its name to torch."""
        return f"{NAMESPACE}::{self.name}"

    def written(self, implementation: Implementation) -> bool:
        """Is there code of this kind, for whatever device?"""
        made = {"native": self.native, "triton": self.triton, "torch": self.torch, "reference": True}
        return bool(made[implementation])

    def offers(self, implementation: Implementation, device: str) -> bool:
        """Is there code of this kind for a device at all?"""
        if implementation == "native":
            return self.native is not None and device == "cpu"
        if implementation == "triton":
            return self.triton is not None and (device == "cuda" or interpreting())
        return implementation == "reference" or device in self.torch


class Registry:
    """The kernels defined so far and the implementations loaded for them."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.chosen: dict[tuple[str, str], tuple[Row, ...]] = {}  # (family, device) -> a row for each op
        self._owners: list[torch.library.Library] = []

    def add(self, kernel: Kernel) -> Function:
        """Give torch the schema, the reference, the fake and the gradient; return the op."""
        if kernel.name in self.kernels:
            raise ValueError(
                f"kernel {kernel.name!r} is already defined, by family {self.kernels[kernel.name].family!r}"
            )
        library = self._owner("FRAGMENT")
        library.define(kernel.name + kernel.schema)
        library.impl(kernel.name, kernel.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(kernel.op, kernel.fake, lib=library)
        if kernel.backward is not None:
            torch.library.register_autograd(
                kernel.op, kernel.backward, setup_context=kernel.saves, lib=library
            )
        self.kernels[kernel.name] = kernel
        op: Function = getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
        return op

    def of(self, family: str) -> list[Kernel]:
        """The family's kernels, which are defined now if they were not."""
        import_module(FAMILIES[family])
        return [kernel for kernel in self.kernels.values() if kernel.family == family]

    def choose(self, family: str, device: str, wanted: Implementation | None) -> tuple[Row, ...]:
        """Register the best implementation of each op of the family for a device type."""
        rows = []
        for kernel in self.of(family):
            failed = []  # what is written but cannot be had
            for implementation in (wanted,) if wanted else ORDER[device]:
                function, why = implement(kernel, implementation, device)
                if function is not None:
                    break
                if kernel.offers(implementation, device):
                    failed.append(f"no {implementation} one: {why}")
            else:
                raise KernelUnavailable(
                    f"{kernel.name} has no {wanted} implementation for {device}: {why}\n{ADVICE}"
                )
            if implementation != "reference":
                self._owner("IMPL").impl(kernel.name, function, device.upper())
            why = "; ".join(failed) or why
            rows.append(Row(kernel.op, device, implementation, True, why))
        return tuple(rows)

    def _owner(self, kind: Literal["FRAGMENT", "IMPL"]) -> Any:
        """A torch.library.Library that lives as long as we do: with its owner goes a registration."""
        owner = torch.library.Library(NAMESPACE, kind)  # type: ignore[no-untyped-call]
        self._owners.append(owner)
        return owner


@cache
def registry() -> Registry:
    """The process's registry; torch's own is per process too."""
    return Registry()


def define(kernel: Kernel) -> Function:
    """Make `torch.ops.ds.<name>` exist, with its reference; called once per op, by the module stating it."""
    return registry().add(kernel)


def implement(kernel: Kernel, implementation: Implementation, device: str) -> tuple[Function | None, str]:
    """One implementation of a kernel, or None, and why (not). May build, the first time."""
    there, why = outlook_of(kernel, implementation, device)
    if not there:
        return None, why
    if implementation == "native" and kernel.native is not None:
        try:
            found = open_library(kernel.family)
        except BuildError as error:
            return None, error.reason
        native = Native(found.handle, Options.from_environment())
        return kernel.native(native), f"{found.origin}; {native.isa}"
    if implementation == "triton" and kernel.triton is not None:
        return kernel.triton(triton_module(kernel.family)), why
    return kernel.reference if implementation == "reference" else kernel.torch[device], why


def triton_module(family: str) -> Any:
    """The module with a family's Triton kernels."""
    return import_module(f"ds_kernels.sources.{family}.{family}_triton")


def interpreting() -> bool:
    """Does Triton run on the CPU here (TRITON_INTERPRET=1, set before the first use)?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load(family: str, device: torch.device, *, strict: bool = False) -> tuple[Row, ...]:
    """Get the fast implementations of a family's ops for a device, and say which they are and why.

    Called in constructors, never on the hot path: the first call may build, a few seconds. When nothing fast
    is to be had the reference is used, and one warning shows the compiler's own first error.
    DS_KERNELS=reference, torch, triton or native forces the choice.
    Raises: KernelUnavailable if what is forced cannot be had; if `strict` and an op gets only its reference.
    """
    wanted = forced()
    if family not in FAMILIES:
        raise LookupError(f"no kernel family {family!r}; there are: {', '.join(FAMILIES)}")
    table, slot = registry().chosen, (family, device.type)
    if slot not in table and device.type not in ORDER:
        table[slot] = tuple(
            Row(
                kernel.op,
                device.type,
                "reference",
                True,
                "there is nothing else for this device",
            )
            for kernel in registry().of(family)
        )
    if slot not in table:
        table[slot] = registry().choose(family, device.type, wanted)
        failed = [row.why for row in table[slot] if row.why.startswith("no ")]
        if failed and not strict:
            _log.warning("%s kernels: slower than they could be, with %s\n%s", family, failed[0], ADVICE)
    rows = table[slot]
    for row in rows:
        if strict and row.implementation == "reference":
            raise KernelUnavailable(
                f"strict loading of {family!r}: {row.op} on {device.type} has only its reference: {row.why}\n"
                + ADVICE
            )
    return rows


def ready(family: str, device: torch.device) -> None:
    """`load` for functions without a constructor: at the first call for a device type, not while tracing."""
    if not torch.compiler.is_compiling():
        _ready(family, device.type)


@cache
def _ready(family: str, device: str) -> None:
    load(family, torch.device(device))


def outlook_of(kernel: Kernel, implementation: Implementation, device: str) -> tuple[bool, str]:
    """Could an implementation be had, and why (not)? Builds and imports nothing."""
    if not kernel.offers(implementation, device):
        return False, f"not for {device} tensors"
    if implementation == "native":
        try:
            return True, outlook(kernel.family)
        except BuildError as error:
            return False, error.reason
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install triton"
    return True, {"torch": "torch's own fused operators", "reference": "always there"}.get(
        implementation, "interpreted, for tests" if interpreting() else "compiled by triton on first use"
    )


def forced() -> Implementation | None:
    """DS_KERNELS. Raises ValueError for a word that is no implementation."""
    wanted = os.environ.get("DS_KERNELS") or None
    if wanted not in (None, "reference", "torch", "triton", "native"):
        raise ValueError(
            f"DS_KERNELS={wanted!r}: allowed are 'reference', 'torch', 'triton', 'native', or leave it unset"
        )
    return cast(Implementation | None, wanted)
