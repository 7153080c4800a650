"""A tensor that is still in files: what loading does to it is noted, and nothing is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ds_zero.load_sources import Cut, Held, Joined, Source, Turned, Viewed, read_whole

_COMPARE_NUMEL = 1 << 20
_aten = torch.ops.aten


class FileTensor(torch.Tensor):
    """Says its shape and dtype; moving, cutting and joining gives another FileTensor.

    Anything else that needs values reads them, whole, and gives an ordinary tensor: slower, never wrong.
    Writing raises RuntimeError. A cast changes what `dtype` says; `source` keeps the file's dtype.
    """

    source: Source

    @staticmethod
    def __new__(cls, source: Source, dtype: torch.dtype | None = None) -> FileTensor:
        made: FileTensor = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=dtype or source.dtype, device=torch.device("cpu")
        )
        made.source = source
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FileTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        note = _NOTED.get(func)
        noted = note(*args, **(kwargs or {})) if note is not None else None
        if noted is not None:
            return noted
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would write to a tensor that is still in its file; change it after the model is "
                "sharded, inside `with ds_zero.gather(param, write=0):`"
            )
        return func(*tree_map(_read, args), **tree_map(_read, dict(kwargs or {})))


def _read(value: Any) -> Any:
    return read_whole(value.source, value.dtype) if isinstance(value, FileTensor) else value


def _same(tensor: FileTensor, *_: Any, **options: Any) -> FileTensor:
    return FileTensor(tensor.source, options.get("dtype") or tensor.dtype)


def _view(tensor: FileTensor, shape: Sequence[int]) -> FileTensor:
    numel, sizes = tensor.numel(), list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = numel // -math.prod(sizes)
    return FileTensor(Viewed(tensor.source, tuple(sizes)), tensor.dtype)


def _unsqueeze(tensor: FileTensor, dim: int) -> FileTensor:
    at = dim % (tensor.dim() + 1)
    return _view(tensor, [*tensor.shape[:at], 1, *tensor.shape[at:]])


def _squeeze(tensor: FileTensor, dim: int | Sequence[int] | None = None) -> FileTensor:
    dims = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % tensor.dim() for d in dims}
    return _view(tensor, [n for d, n in enumerate(tensor.shape) if d not in gone or n != 1])


def _permute(tensor: FileTensor, dims: Sequence[int]) -> FileTensor:
    return FileTensor(Turned(tensor.source, tuple(dim % tensor.dim() for dim in dims)), tensor.dtype)


def _transpose(tensor: FileTensor, first: int = 0, second: int = 1) -> FileTensor:
    if tensor.dim() < 2:
        return _same(tensor)
    dims = list(range(tensor.dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(tensor, dims)


def _slice(
    tensor: FileTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> FileTensor | None:
    if step != 1:
        return None
    dim %= tensor.dim()
    low, high, _ = slice(start, end).indices(tensor.shape[dim])
    return FileTensor(Cut(tensor.source, dim, low, max(low, high)), tensor.dtype)


def _select(tensor: FileTensor, dim: int, index: int) -> FileTensor:
    dim %= tensor.dim()
    index %= tensor.shape[dim]
    row = FileTensor(Cut(tensor.source, dim, index, index + 1), tensor.dtype)
    return _view(row, [*tensor.shape[:dim], *tensor.shape[dim + 1 :]])


def _unbind(tensor: FileTensor, dim: int = 0) -> list[FileTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: FileTensor, size: int | Sequence[int], dim: int = 0) -> list[FileTensor]:
    dim %= tensor.dim()
    rows, at, parts = tensor.shape[dim], 0, []
    sizes = [min(size, rows - low) for low in range(0, rows, size)] if isinstance(size, int) else size
    for numel in sizes:
        parts.append(FileTensor(Cut(tensor.source, dim, at, at + numel), tensor.dtype))
        at += numel
    return parts


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> FileTensor:
    full = [tensor for tensor in tensors if tuple(tensor.shape) != (0,)]
    sources = tuple(t.source if isinstance(t, FileTensor) else Held(t) for t in full)
    dtype = full[0].dtype
    for tensor in full[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return FileTensor(Joined(sources, dim % full[0].dim()), dtype)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> FileTensor:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _pad(tensor: FileTensor, pad: Sequence[int], value: float = 0) -> FileTensor | None:
    return None if any(pad) else _same(tensor)


def _equal(first: Tensor, second: Tensor) -> bool:
    """A piece at a time."""
    if first.shape != second.shape:
        return False
    dtype = torch.promote_types(first.dtype, second.dtype)
    sources = [t.source if isinstance(t, FileTensor) else Held(t) for t in (first, second)]
    for begin in range(0, first.numel(), _COMPARE_NUMEL):
        pieces = []
        for source in sources:
            piece = torch.empty(min(_COMPARE_NUMEL, first.numel() - begin), dtype=dtype)
            source.read(begin, piece)
            pieces.append(piece)
        if not torch.equal(*pieces):
            return False
    return True


# aten operation -> what becomes of the note; None from one of these means: read after all
_NOTED: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten.contiguous.default: _same,
    _aten.lift_fresh.default: _same,
    _aten._to_copy.default: _same,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.reshape.default: _view,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: _transpose,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.constant_pad_nd.default: _pad,
    _aten.equal.default: _equal,
}
