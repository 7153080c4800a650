"""Which ops there are, and which implementation each of them gets on which device, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch

from ds_kernels.build import ADVICE, BuildError
from ds_kernels.library import open_library

Implementation = Literal["native", "torch", "reference"]
NAMESPACE = "ds"

# family -> the module that defines its ops
_FAMILIES = {"adam": "ds_kernels.ops.adam"}
_log = logging.getLogger("ds_kernels")


class KernelUnavailable(RuntimeError):
    """The wanted implementation of a family cannot be had here."""


class Row(NamedTuple):
    """One line of the table: what an op runs on a device, and why."""

    op: str
    device: str
    implementation: str
    why: str


@dataclass(frozen=True)
class Kernel:
    """An op's contract: schema and reference first, fast ones later. Dispatch is torch.library's, not ours.

    `natives` maps a device type to a function from the loaded library to the op's implementation there;
    `torch_natives` maps one to an implementation made of torch's own fused operators.
    """

    name: str
    schema: str  # without the name: "(Tensor(a!)[] params, ...) -> ()"
    family: str  # folder under kernels/
    reference: Callable[..., Any]  # runs on any device
    fake: Callable[..., Any]  # checks and output shapes only, for tracing
    natives: dict[str, Callable[[Any], Callable[..., Any]]] = field(default_factory=dict)
    torch_natives: dict[str, Callable[..., Any]] = field(default_factory=dict)


class Registry:
    """The kernels defined so far and the implementations loaded for them."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.chosen: dict[tuple[str, str], tuple[Implementation, str]] = {}
        self._owners: list[torch.library.Library] = []

    def add(self, kernel: Kernel) -> Callable[..., Any]:
        """Give torch the schema, the reference and the fake; return the op."""
        if kernel.name in self.kernels:
            raise ValueError(
                f"kernel {kernel.name!r} is already defined, by family {self.kernels[kernel.name].family!r}"
            )
        library = self._owner("FRAGMENT")
        library.define(kernel.name + kernel.schema)
        library.impl(kernel.name, kernel.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{kernel.name}", kernel.fake, lib=library)
        self.kernels[kernel.name] = kernel
        op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
        return op

    def choose(self, family: str, device: str, forced: str | None) -> tuple[Implementation, str]:
        """Register the best implementation of the family's ops for a device type. Raises BuildError."""
        if forced == "reference":
            return "reference", "DS_KERNELS=reference"
        kernels = [kernel for kernel in self.kernels.values() if kernel.family == family]
        if any(device in kernel.natives for kernel in kernels):
            found = open_library(family)
            for kernel in kernels:
                native = kernel.natives[device](found.handle)
                self._owner("IMPL").impl(kernel.name, native, device.upper())
            return "native", found.origin
        if forced == "native":
            raise BuildError(family, f"there is no native implementation for device {device!r}")
        if any(device in kernel.torch_natives for kernel in kernels):
            for kernel in kernels:
                self._owner("IMPL").impl(kernel.name, kernel.torch_natives[device], device.upper())
            return "torch", "torch's own fused operators"
        return "reference", f"no other implementation for device {device!r}"

    def _owner(self, kind: Literal["FRAGMENT", "IMPL"]) -> Any:
        """A torch.library.Library that lives as long as we do: with its owner goes a registration."""
        owner = torch.library.Library(NAMESPACE, kind)  # type: ignore[no-untyped-call]
        self._owners.append(owner)
        return owner


@cache
def registry() -> Registry:
    """The process's registry; torch's own is per process too."""
    return Registry()


def define(kernel: Kernel) -> Callable[..., Any]:
    """Make `torch.ops.ds.<name>` exist, with its reference; called once per op, by the module stating it."""
    return registry().add(kernel)


def load(family: str, device: torch.device, *, strict: bool = False) -> Implementation:
    """Get the family's fast implementation for a device, and say which it is.

    Called in constructors, never on the hot path: the first call may build, about three seconds. When nothing
    fast is to be had the reference is used, and one warning shows the compiler's own first error.
    DS_KERNELS=reference or native forces the choice.
    Raises: KernelUnavailable if `strict` or DS_KERNELS=native and the native implementation cannot be had.
    """
    forced = _forced()
    if family not in _FAMILIES:
        raise LookupError(f"no kernel family {family!r}; there are: {', '.join(_FAMILIES)}")
    import_module(_FAMILIES[family])
    table = registry().chosen
    slot = (family, device.type)
    if slot not in table:
        try:
            table[slot] = registry().choose(family, device.type, forced)
        except BuildError as error:
            if strict or forced == "native":
                raise KernelUnavailable(str(error)) from error
            table[slot] = ("reference", error.reason)
            _log.warning(
                "%s kernels: using the torch reference, because %s\n%s", family, error.reason, ADVICE
            )
    implementation, why = table[slot]
    if implementation == "reference" and (strict or forced == "native"):
        raise KernelUnavailable(
            f"strict loading of {family!r} for {device.type}: only the reference is there: {why}"
        )
    return implementation


def report() -> list[Row]:
    """One row per op and device: which implementation it gets here and why. Loads, and so may build."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for family, module in _FAMILIES.items():
        import_module(module)
        for device in devices:
            load(family, torch.device(device))
            implementation, why = registry().chosen[family, device]
            ops = [kernel.name for kernel in registry().kernels.values() if kernel.family == family]
            rows += [Row(f"{NAMESPACE}::{op}", device, implementation, why) for op in ops]
    return rows


def _forced() -> str | None:
    wanted = os.environ.get("DS_KERNELS") or None
    if wanted not in (None, "reference", "native"):
        raise ValueError(f"DS_KERNELS={wanted!r}: allowed are 'reference', 'native', or leave it unset")
    return wanted
