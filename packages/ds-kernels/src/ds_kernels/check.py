"""What every op says about arguments that do not fit: a ValueError with op, argument, value, what fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import NoReturn

import torch
from torch import Tensor


def names(values: Iterable[object]) -> str:
    """Dtypes, devices and layouts without `torch.`."""
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def shown(tensor: Tensor) -> str:
    """A tensor in an error message."""
    dtype, layout = names([tensor.dtype]), names([tensor.layout])
    return f"shape {tuple(tensor.shape)}, {dtype}, {tensor.device}, {layout}"


def refuse(op: str, argument: str, found: Tensor | object, wanted: str) -> NoReturn:
    """Raise the ValueError."""
    text = shown(found) if isinstance(found, Tensor) else repr(found)
    raise ValueError(f"{op}: {argument} is {text}; wanted: {wanted}")


def tensor(
    op: str,
    argument: str,
    value: Tensor,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    shape: Sequence[int | None] | None = None,
    numel: int | None = None,
    dims: int | None = None,
) -> None:
    """Raise ValueError unless a tensor is strided and as asked; None in `shape` is any size."""
    wanted = []
    if dtypes is not None and value.dtype not in dtypes:
        wanted.append(f"dtype {names(dtypes)}")
    if device is not None and value.device != device:
        wanted.append(f"on {device}")
    if value.layout != torch.strided:
        wanted.append("strided")
    if dims is not None and value.dim() < dims:
        wanted.append(f"at least {dims} dimensions")
    if (
        shape is not None
        and value.shape != tuple(shape)
        and (  # mostly equal, and then nothing else to see
            value.dim() != len(shape)
            or any(want not in (None, have) for have, want in zip(value.shape, shape, strict=True))
        )
    ):
        wanted.append(f"shape ({', '.join('any' if n is None else str(n) for n in shape)})")
    if numel is not None and value.numel() != numel:
        wanted.append(f"{numel} elements")
    if wanted:
        refuse(op, argument, value, "; ".join(wanted))


def number(op: str, argument: str, value: float, allowed: str, fits: bool) -> None:
    """Raise ValueError unless a number fits."""
    if not fits:
        raise ValueError(f"{op}: {argument}={value} is not allowed: it must be {allowed}")


def apart(op: str, tensors: dict[str, Tensor | None], read: Iterable[str] = ()) -> None:
    """Raise ValueError when the memory of two of these overlaps; `read` names those not written.

    Exact for contiguous tensors and for columns of one buffer, side by side in each of its rows; of others
    the span from the first to the last element counts.
    """
    only_read = set(read)
    spans = [(*_span(t), name, t) for name, t in tensors.items() if t is not None and t.numel()]
    spans.sort(key=lambda span: span[:3])
    if all(one[1] <= other[0] for one, other in pairwise(spans)):
        return
    for (begin_one, end, one, first), (begin, _, other, second) in combinations(spans, 2):
        if (
            begin < end
            and not {one, other} <= only_read
            and not _side_by_side(begin - begin_one, first, second)
        ):
            raise ValueError(f"{op}: {one} and {other} share memory; give each its own")


def _side_by_side(distance: int, first: Tensor, second: Tensor) -> bool:
    """Are these [rows, n], `distance` bytes apart, of one stride into which rows of both fit side by side?"""
    if not first.dim() == second.dim() == 2 or not first.stride(1) == second.stride(1) == 1:
        return False
    stride, other = (t.stride(0) * t.element_size() for t in (first, second))
    width, rest = (t.shape[1] * t.element_size() for t in (first, second))
    return stride == other and width <= distance and distance + rest <= stride


def _span(value: Tensor) -> tuple[int, int]:
    if value.is_contiguous():
        begin = value.data_ptr()
        return begin, begin + value.numel() * value.element_size()
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
