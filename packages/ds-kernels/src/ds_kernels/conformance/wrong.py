"""Calls that do not fit, made from calls that do: each must be refused with a ValueError."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_kernels.conformance.compare import Case, copied, named, samples, tensors, writable
from ds_kernels.conformance.sample import Sample


def accepted(case: Case, *, most: int = 3) -> Iterator[str]:
    """Every wrong call that was not refused as it should be, made from `most` of the op's samples."""
    given = [
        s for s in samples(case.kernel, case.device) if all(t.numel() for _, t in tensors(case.kernel, s))
    ]
    for sample in given[:: max(1, len(given) // most)][:most]:
        for label, args in _wrong_calls(case, sample):
            where = f"{case.kernel.name}, {case.name}, {label}"
            before = {name: _copy(value) for name, value in args.items()}
            try:
                case.function(*_positional(case, args), **_keywords(case, args))
            except ValueError as error:
                if case.kernel.name not in str(error):
                    yield f"{where}: the error does not name the op: {error}"
            except Exception as error:
                yield f"{where}: {type(error).__name__} instead of ValueError: {error}"
            else:
                yield f"{where}: not refused"
            if not all(_same(before[name], args[name]) for name in args):
                yield f"{where}: changed an argument of a call that it refused"


def _wrong_calls(case: Case, sample: Sample) -> Iterator[tuple[str, dict[str, Any]]]:
    def fresh() -> dict[str, Any]:
        return named(case.kernel, copied(sample))

    given = tensors(case.kernel, sample)
    for (name, index), value in given:
        for kind, changed in _wrong_tensors(value):
            if f"{name}.{kind}" not in sample.free:
                args = fresh()
                args[name] = _put(args[name], index, changed)
                yield f"{sample.label}: {name}[{index}] with wrong {kind}", args
    for name, value in fresh().items():
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if plain and f"{name}.value" not in sample.free:
            wrong: float = -1 if isinstance(value, int) else float("nan")
            yield f"{sample.label}: {name}={wrong}", {**fresh(), name: wrong}
    for (one, i), value in given if "alias" not in sample.free else ():
        for (other, j), like in given if one in writable(case.kernel) else ():
            if one != other and f"{other}.alias" not in sample.free and _alike(value, like):
                args = fresh()
                shared = args[one] if isinstance(args[one], Tensor) else args[one][i]
                args[other] = _put(args[other], j, shared)
                yield f"{sample.label}: {other}[{j}] is {one}[{i}]", args


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _wrong_tensors(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "dtype", value.to(torch.complex64)
    yield "dtype", value.to(torch.bool)
    yield "device", value.to("meta")
    longer = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
    yield "shape", longer
    yield "layout", value.reshape(1, -1).to(torch.float32).to_sparse()


def _put(value: Any, index: int, changed: Tensor) -> Any:
    if isinstance(value, Tensor):
        return changed
    return [changed if i == index else part for i, part in enumerate(value)]


def _positional(case: Case, args: dict[str, Any]) -> list[Any]:
    return [value for name, value in args.items() if name not in _keyword_names(case)]


def _keywords(case: Case, args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name in _keyword_names(case)}


def _keyword_names(case: Case) -> set[str]:
    op = getattr(torch.ops.ds, case.kernel.name).default
    return {arg.name for arg in op._schema.arguments if arg.kwarg_only}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_sparse or value.is_meta else value.clone()
    return [_copy(part) for part in value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if one.is_sparse or one.is_meta:
            return True
        left, right = (torch.view_as_real(t) if t.is_complex() else t for t in (one, other))
        return torch.allclose(left.double(), right.double(), rtol=0, atol=0, equal_nan=True)
    if isinstance(one, list):
        return all(map(_same, one, other))
    return True
