"""Softmax over the last dimension of scaled, masked scores, in one pass over memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code
from ds_kernels.registry import Kernel, define, ready
from ds_kernels.rounding import UNIT, once

FAMILY, NAME, NAME_BACKWARD = "softmax", "softmax", "softmax_backward"


def softmax(x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """softmax(x * scale + mask) over the last dimension, in fp32, rounded once.

    `mask`: boolean, True stays, or floating, added; it broadcasts, repeated dimensions are not copied, and it
    gets no gradient. `causal`: query i of Q sees keys up to K - Q + i. A row in which nothing stays is zeros,
    where torch says NaN.
    Shapes: x [..., Q, K] fp32, bf16, fp16 (float64: reference only), mask broadcastable to x -> like x.
    """
    if mask is not None and mask.requires_grad:
        check.refuse(NAME, "mask", mask, "a mask that needs no gradient: this op gives it none")
    ready(FAMILY, x.device)
    made: Tensor = OP(x, mask, scale=scale, causal=causal)
    return made


# -- references --------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype) -> Tensor:
    """What the exponential is taken of; -inf where nothing stays."""
    v = x.to(dtype) * scale
    if mask is not None:
        v = v.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else v + mask.to(dtype)
    if causal:
        queries, keys = x.shape[-2:]
        late = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
        v = v.masked_fill(late, -torch.inf)
    return v


def reference(x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """The op."""
    out = fake(x, mask, scale=scale, causal=causal)
    v = logits(x, mask, scale, causal, wide(x.dtype))
    made = v.softmax(-1).masked_fill((v == -torch.inf).all(-1, keepdim=True), 0)
    return out.copy_(made)


def reference_backward(dy: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """The gradient of x."""
    fake_backward(dy, y, scale=scale)
    up, v = dy.to(wide(y.dtype)), y.to(wide(y.dtype))
    return (v * (up - (v * up).sum(-1, keepdim=True)) * scale).to(y.dtype)


# -- what fits ---------------------------------------------------------------------------------------------


def _check(op: str, name: str, x: Tensor, scale: float) -> None:
    check.tensor(op, name, x, dtypes=(*DTYPES, torch.float64), dims=1)
    if x.shape[-1] == 0:
        check.refuse(op, name, x, "at least one element in the last dimension")
    check.number(op, "scale", scale, "finite", abs(scale) < float("inf"))


def fake(x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """Checks, and what is returned."""
    _check(NAME, "x", x, scale)
    if causal and x.dim() < 2:
        check.refuse(NAME, "x", x, "at least 2 dimensions, as causal=True")
    if mask is not None:
        check.tensor(NAME, "mask", mask, dtypes=(torch.bool, *DTYPES, torch.float64), device=x.device)
        fits = mask.dim() <= x.dim() and all(
            m in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
        )
        if not fits:
            check.refuse(NAME, "mask", mask, f"a shape that broadcasts to x's {tuple(x.shape)}")
    return x.new_empty(x.shape)


def fake_backward(dy: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """Checks, and what is returned."""
    _check(NAME_BACKWARD, "y", y, scale)
    check.tensor(NAME_BACKWARD, "dy", dy, dtypes=[y.dtype], device=y.device, shape=y.shape)
    return y.new_empty(y.shape)


# -- gradient ----------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(output)
    ctx.scale = keyword_only_inputs["scale"]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return BACKWARD(dy, *ctx.saved_tensors, scale=ctx.scale), None


# -- native ------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """DsSoftmaxCall of sources/softmax/softmax_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dy", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("outer", "middle", "inner", "cols")),
        ("mask_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("mask_bytes", "causal", "dtype", "isa", "threads")),
    )


def four_dims(x: Tensor) -> tuple[int, int, int, int]:
    """The shape as [outer, middle, inner, cols]."""
    inner = x.shape[-2] if x.dim() > 1 else 1
    middle = x.shape[-3] if x.dim() > 2 else 1
    outer = 1
    for size in x.shape[:-3]:
        outer *= size
    return outer, middle, inner, x.shape[-1]


def mask_rows(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as a view [outer, middle, inner, cols], fp32 or boolean, a row's elements side by side."""
    if mask.dtype != torch.bool:
        mask = mask.to(torch.float32)
    if mask.dim() == 0 or mask.shape[-1] != x.shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
    return mask.expand(x.shape).reshape(four_dims(x))


class _Library:
    """Both ops over the family's library."""

    def __init__(self, library: Native) -> None:
        self._isa = library.isa_code
        self._run = library.function("ds_softmax", ctypes.POINTER(_Call))

    def forward(self, x: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
        out = fake(x, mask, scale=scale, causal=causal)
        if x.dtype == torch.float64:
            return reference(x, mask, scale=scale, causal=causal)
        if x.numel():
            rows = None if mask is None else mask_rows(mask, x)
            self._call(x.contiguous(), None, rows, out, scale, causal)
        return out

    def backward(self, dy: Tensor, y: Tensor, *, scale: float) -> Tensor:
        dx = fake_backward(dy, y, scale=scale)
        if y.dtype == torch.float64:
            return reference_backward(dy, y, scale=scale)
        if y.numel():
            self._call(y.contiguous(), dy.contiguous(), None, dx, scale, False)
        return dx

    def _call(
        self, x: Tensor, dy: Tensor | None, mask: Tensor | None, out: Tensor, scale: float, causal: bool
    ) -> None:
        strides = (ctypes.c_int64 * 3)(*(mask.stride()[:3] if mask is not None else ()))
        at = [None if t is None else t.data_ptr() for t in (x, dy, mask, out)]
        plain = mask is not None and mask.dtype == torch.bool
        codes = (plain, causal, code(x.dtype), self._isa, torch.get_num_threads())
        self._run(_Call(*at, *four_dims(x), strides, scale, *codes))


# -- how far from the reference ----------------------------------------------------------------------------


def _bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """A logit is off by a unit of x * scale and one of itself, the largest too, and their difference rounds;
    that is the relative error of an exponential, beside its own 4 units; the sum of n adds n units, the
    quotient 2. Results under 2^-126 are rounded in steps of 2^-149.
    """
    x, mask = args
    v = logits(x, mask, kwargs["scale"], kwargs["causal"], torch.float64)
    finite = v.masked_fill(v == -torch.inf, 0)
    size = (x.double() * kwargs["scale"]).abs() + finite.abs()
    most = size.masked_fill(v == -torch.inf, 0).amax(-1, keepdim=True)
    units = x.shape[-1] + 12 + 3 * (size + most)
    return [wanted[0].double() * 2 * UNIT * units + once(wanted[0], x.dtype) + 2.0**-146]


def _bound_backward(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """The sum of n products is off by n units of their sizes; then four roundings."""
    dy, y = args[0].double().abs(), args[1].double().abs()
    units = 4 * dy + (y.shape[-1] + 6) * (y * dy).sum(-1, keepdim=True)
    return [abs(kwargs["scale"]) * y * 2 * UNIT * units + once(wanted[0], args[1].dtype)]


OP = define(
    Kernel(
        name=NAME,
        schema="(Tensor x, Tensor? mask, *, float scale, bool causal) -> Tensor",
        family=FAMILY,
        reference=reference,
        fake=fake,
        native=lambda library: _Library(library).forward,
        triton=lambda module: module.softmax,
        backward=_gradient,
        saves=_saves,
        bound=_bound,
    )
)
BACKWARD = define(
    Kernel(
        name=NAME_BACKWARD,
        schema="(Tensor dy, Tensor y, *, float scale) -> Tensor",
        family=FAMILY,
        reference=reference_backward,
        fake=fake_backward,
        native=lambda library: _Library(library).backward,
        triton=lambda module: module.softmax_backward,
        bound=_bound_backward,
    )
)
