"""Runs an implementation and the reference on the same calls, and says where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ds_kernels.build import BuildError
from ds_kernels.conformance.sample import Sample, Samples
from ds_kernels.library import open_library
from ds_kernels.native import Native, Options
from ds_kernels.registry import FAMILIES, NAMESPACE, Function, Kernel, implement, interpreting, registry

Place = tuple[str, int]  # (argument, index in its list)


@dataclass(frozen=True)
class Case:
    """An implementation of an op: what the conformance test is run for."""

    kernel: Kernel
    name: str  # "native avx2", "triton interpreted", "torch"
    function: Function
    device: torch.device


def samples(kernel: Kernel, device: torch.device) -> Iterator[Sample]:
    """The calls that the op's family gives. Raises LookupError for an op without any."""
    table: Mapping[str, Samples] = import_module(f"ds_kernels.conformance.{kernel.family}").SAMPLES
    if kernel.name not in table:
        raise LookupError(f"op {kernel.name!r} has no samples in ds_kernels/conformance/{kernel.family}.py")
    yield from table[kernel.name](device)


def gradient_samples(kernel: Kernel) -> Iterator[Sample]:
    """Calls in float64 whose gradients are checked against finite differences; for ops with a backward."""
    yield from import_module(f"ds_kernels.conformance.{kernel.family}").GRADIENTS[kernel.name]()


def cases(device: torch.device, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Case]:
    """Every implementation that can be had here for a device, the reference excepted."""
    for kernel in (kernel for family in families for kernel in registry().of(family)):
        if kernel.native is not None and device.type == "cpu":
            try:
                handle = open_library(kernel.family).handle
                isas = Native(handle).isas()
            except BuildError:
                isas = []
            for isa in isas:
                native = kernel.native(Native(handle, Options(isa)))
                yield Case(kernel, f"native {isa}", native, device)
        function, _ = implement(kernel, "triton", device.type)
        if function is not None:
            yield Case(kernel, "triton interpreted" if interpreting() else "triton", function, device)
        if device.type in kernel.torch:
            yield Case(kernel, "torch", kernel.torch[device.type], device)


def disagreements(case: Case, *, every: int = 3) -> Iterator[str]:
    """Every way in which the implementation does not do what the reference does; nothing when all is well.

    One call in `every` is tried with gaps between elements and at odd addresses too.
    """
    for number, sample in enumerate(samples(case.kernel, case.device)):
        yield from _compare(case, sample, copied(sample))
        for layout in (strided, shifted) if number % every == 0 else ():
            again = replace(sample, label=f"{sample.label}, {layout.__name__}")
            yield from _compare(case, again, mapped(again, layout))


def strided(value: Tensor) -> Tensor:
    """The same values with a gap after each."""
    wide = value.new_zeros((*value.shape, 2))
    wide[..., 0] = value
    return wide[..., 0]


def shifted(value: Tensor) -> Tensor:
    """The same values at an address that only the element size divides."""
    longer = value.new_zeros(value.numel() + 1)
    longer[1:] = value.reshape(-1)
    return longer[1:].view(value.shape)


def _compare(case: Case, wanted: Sample, mine: Sample) -> Iterator[str]:
    where = f"{NAMESPACE}::{case.kernel.name}, {case.name}, {wanted.label}"
    wanted, before = copied(wanted), copied(wanted)
    left = _leaves(case.kernel.reference(*wanted.args, **wanted.kwargs))
    right = _leaves(case.function(*mine.args, **mine.kwargs))
    if len(left) != len(right):
        yield f"{where}: returns {len(right)} tensors, the reference {len(left)}"
        return
    writes = writable(case.kernel)
    names = [f"output {i}" for i in range(len(left))]
    names += [f"{argument}[{i}]" for (argument, i), _ in tensors(case.kernel, mine) if argument in writes]
    left += [t for (argument, _), t in tensors(case.kernel, wanted) if argument in writes]
    right += [t for (argument, _), t in tensors(case.kernel, mine) if argument in writes]
    bounds: Sequence[Any] = [0.0] * len(left)
    if case.kernel.bound is not None:
        bounds = case.kernel.bound(before.args, before.kwargs, left)
    for name, a, b, bound in zip(names, left, right, bounds, strict=True):
        yield from (f"{where}: {name} {words}" for words in _differ(a, b, bound))
    unread = zip(tensors(case.kernel, before), tensors(case.kernel, mine), strict=True)
    for (place, was), (_, now) in unread:
        if place[0] not in writes and not torch.equal(_bits(was), _bits(now)):
            yield f"{where}: changed {place[0]}[{place[1]}], which its schema does not say"


def _differ(wanted: Tensor, mine: Tensor, bound: Any) -> Iterator[str]:
    if (wanted.shape, wanted.dtype) != (mine.shape, mine.dtype):
        yield f"is {tuple(mine.shape)} {mine.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        return
    if not wanted.dtype.is_floating_point or wanted.element_size() == 1:
        a, b = (t.double() if t.dtype.is_floating_point else t.to(torch.int64) for t in (wanted, mine))
        far = ((a - b).abs() > bound) & ~(a.isnan() & b.isnan())
    else:
        a, b = wanted.double(), mine.double()
        far = ~(((a - b).abs() <= bound) | (a == b) | (a.isnan() & b.isnan()))
    if far.any():
        at = tuple(int(i) for i in far.nonzero()[0])
        limit = bound[at].item() if isinstance(bound, Tensor) and bound.dim() else float(bound)
        yield f"at {at} is {b[at].item()!r}, not {a[at].item()!r} within {limit:.3g} ({int(far.sum())} such)"


# -- arguments ---------------------------------------------------------------------------------------------


def writable(kernel: Kernel) -> set[str]:
    """Names of the arguments that the schema lets the op write."""
    schema = _schema(kernel)
    return {arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}


def tensors(kernel: Kernel, sample: Sample) -> list[tuple[Place, Tensor]]:
    """Every tensor among the arguments, with where it stands."""
    found = []
    for name, value in named(kernel, sample).items():
        found += [((name, i), t) for i, t in enumerate(_leaves(value))]
    return found


def named(kernel: Kernel, sample: Sample) -> dict[str, Any]:
    """The arguments by name."""
    names = [arg.name for arg in _schema(kernel).arguments if not arg.kwarg_only]
    return {**dict(zip(names, sample.args, strict=False)), **sample.kwargs}


def _schema(kernel: Kernel) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), kernel.name).default._schema


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return []


def copied(sample: Sample) -> Sample:
    """The same call with memory of its own."""
    return mapped(sample, lambda t: t.clone())


def mapped(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """The same call with every tensor changed."""

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [each(part) for part in value] if isinstance(value, (list, tuple)) else value

    kwargs = {name: each(value) for name, value in sample.kwargs.items()}
    return replace(sample, args=tuple(each(value) for value in sample.args), kwargs=kwargs)


def _bits(value: Tensor) -> Tensor:
    """As integers, so that NaN equals itself."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(sizes[value.element_size()]) if not value.is_complex() else value
