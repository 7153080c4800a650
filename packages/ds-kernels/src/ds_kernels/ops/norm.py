"""RMSNorm and LayerNorm over the last dimension, with the addition of a residual in the same pass."""

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

FAMILY, NAME, NAME_BACKWARD = "norm", "norm", "norm_backward"


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once (Zhang and Sennrich 2019, equation 4).

    Shapes: x [..., C] fp32, bf16, fp16 (float64: reference only), weight [C] of any of these -> like x.
    """
    return _run(x, None, weight, None, eps, False)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): a transformer block's two steps in one pass over memory.

    Shapes: as `rms_norm`; residual, and what is returned, like x.
    """
    return _run(x, residual, weight, None, eps, False)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, in fp32, rounded once (Ba et al. 2016).

    Shapes: x [..., C] fp32, bf16, fp16 (float64: reference only), weight and bias [C] of any -> like x.
    """
    return _run(x, None, weight, bias, eps, True)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass over memory.

    Shapes: as `layer_norm`; residual, and what is returned, like x.
    """
    return _run(x, residual, weight, bias, eps, True)


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    ready(FAMILY, x.device)
    y, total, _, _ = OP(x, residual, weight, bias, eps=eps, center=center)
    return y, total


# -- references --------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; x + residual, rounded before it is used, or empty; mean, or empty; 1 / sqrt(var + eps)."""
    _, total, mean, _ = fake(x, residual, weight, bias, eps=eps, center=center)
    v = x.to(wide(x.dtype))
    if residual is not None:
        total = (v + residual).to(x.dtype)
        v = total.to(v.dtype)
    if center:
        mean = v.mean(-1)
        v = v - mean[..., None]
    rstd = (v.square().mean(-1) + eps).sqrt().reciprocal()
    y = v * rstd[..., None]
    if weight is not None:
        y = y * weight.to(v.dtype)
    if bias is not None:
        y = y + bias.to(v.dtype)
    return y.to(x.dtype), total, mean, rstd


def reference_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    **how: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of the weight and of the bias; the latter in fp32, or empty."""
    _, dweight, dbias = fake_backward(dy, dtotal, x, weight, mean, rstd, **how)
    up, v = dy.to(rstd.dtype), x.to(rstd.dtype)
    if how["center"]:
        v = v - mean[..., None]
    v = v * rstd[..., None]
    g = up if weight is None else up * weight.to(rstd.dtype)
    dx = g - g.mean(-1, keepdim=True) if how["center"] else g
    dx = (dx - v * (g * v).mean(-1, keepdim=True)) * rstd[..., None]
    if dtotal is not None:
        dx = dx + dtotal
    if how["want_weight"]:
        dweight = (up * v).reshape(-1, x.shape[-1]).sum(0)
    if how["want_bias"]:
        dbias = up.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight, dbias


# -- what fits ---------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, weight: Tensor | None, **others: Tensor | None) -> None:
    check.tensor(op, "x", x, dtypes=(*DTYPES, torch.float64), dims=1)
    if x.shape[-1] == 0:
        check.refuse(op, "x", x, "at least one element in the last dimension")
    allowed = [torch.float64] if x.dtype == torch.float64 else DTYPES
    for name, value in (("weight", weight), ("bias", others.pop("bias", None))):
        if value is not None:
            check.tensor(op, name, value, dtypes=allowed, device=x.device, shape=x.shape[-1:])
    for name, value in others.items():
        if value is not None:
            check.tensor(op, name, value, dtypes=[x.dtype], device=x.device, shape=x.shape)


def fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks, and what is returned."""
    _check(NAME, x, weight, bias=bias, residual=residual)
    check.number(NAME, "eps", eps, "finite and >= 0", 0 <= eps < float("inf"))
    total = x.new_empty((0,) if residual is None else x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=wide(x.dtype))
    return x.new_empty(x.shape), total, rstd.new_empty(rstd.shape if center else (0,)), rstd


def fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    **how: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, and what is returned."""
    _check(NAME_BACKWARD, x, weight, dy=dy, dtotal=dtotal)
    like = wide(x.dtype)
    for name, value, size in (
        ("mean", mean, x.shape[:-1] if how["center"] else (0,)),
        ("rstd", rstd, x.shape[:-1]),
    ):
        check.tensor(NAME_BACKWARD, name, value, dtypes=[like], device=x.device, shape=size)
    sums = [
        x.new_empty(x.shape[-1:] if how[want] else (0,), dtype=like) for want in ("want_weight", "want_bias")
    ]
    return x.new_empty(x.shape), sums[0], sums[1]


# -- gradient ----------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, residual, weight, bias = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.center = keyword_only_inputs["center"]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*([total] if residual is None else []), mean, rstd)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None
    want_weight, want_bias = ctx.needs_input_grad[2:4]
    dx, dweight, dbias = BACKWARD(
        dy, dtotal, x, weight, mean, rstd, center=ctx.center, want_weight=want_weight, want_bias=want_bias
    )
    return (
        dx,
        dx if ctx.needs_input_grad[1] else None,
        dweight.to(weight.dtype) if want_weight else None,
        dbias.to(ctx.bias_dtype) if want_bias else None,
    )


# -- native ------------------------------------------------------------------------------------------------


def _fields(pointers: Sequence[str], *more: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    sizes = [(name, ctypes.c_int64) for name in ("rows", "cols")]
    codes = [(name, ctypes.c_int32) for name in ("dtype", "isa", "threads")]
    return (*((name, ctypes.c_void_p) for name in pointers), *sizes, *more, *codes)


class _Call(ctypes.Structure):
    """DsNormCall of sources/norm/norm_cpu.cpp, field by field."""

    _fields_ = _fields(
        ("x", "residual", "weight", "bias", "y", "total", "mean", "rstd"), ("eps", ctypes.c_float)
    )


class _BackwardCall(ctypes.Structure):
    """DsNormBackwardCall of sources/norm/norm_cpu.cpp, field by field."""

    _fields_ = _fields(("dy", "dtotal", "x", "weight", "mean", "rstd", "dx", "dweight", "dbias"))


class _Library:
    """Both ops over the family's library."""

    def __init__(self, library: Native) -> None:
        self._isa = library.isa_code
        self._forward = library.function("ds_norm", ctypes.POINTER(_Call))
        self._backward = library.function("ds_norm_backward", ctypes.POINTER(_BackwardCall))

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, **how: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, total, mean, rstd = fake(x, residual, weight, bias, **how)
        if x.dtype == torch.float64:
            return reference(x, residual, weight, bias, **how)
        keep = [_flat(x), _flat(residual), _flat(weight, torch.float32), _flat(bias, torch.float32)]
        given = [y, None if residual is None else total, mean if how["center"] else None, rstd]
        self._forward(_Call(*map(_pointer, (*keep, *given)), *_sizes(x), how["eps"], *self._codes(x)))
        return y, total, mean, rstd

    def backward(
        self,
        dy: Tensor,
        dtotal: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        **how: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = fake_backward(dy, dtotal, x, weight, mean, rstd, **how)
        if x.dtype == torch.float64:
            return reference_backward(dy, dtotal, x, weight, mean, rstd, **how)
        keep = [_flat(t) for t in (dy, dtotal, x)]
        keep += [_flat(weight, torch.float32), _flat(mean) if how["center"] else None, _flat(rstd)]
        given = [dx, dweight if how["want_weight"] else None, dbias if how["want_bias"] else None]
        self._backward(_BackwardCall(*map(_pointer, (*keep, *given)), *_sizes(x), *self._codes(x)))
        return dx, dweight, dbias

    def _codes(self, x: Tensor) -> tuple[int, int, int]:
        return code(x.dtype), self._isa, torch.get_num_threads()


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _flat(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if value is None else value.to(dtype or value.dtype).contiguous()


def _pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


# -- how far from the reference ----------------------------------------------------------------------------


def _bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    """A sum of n terms is off by n units of the sum of their sizes; both sides are.

    The mean so is off by `m`; the sum of squares by n + 4 units, its root by half of that, and m^2 beside the
    variance; then at most 6 roundings on the way to y.
    """
    x, residual, weight, bias = args
    v = x.double() if residual is None else wanted[1].double()
    n, rstd = v.shape[-1], wanted[3].double()[..., None]
    m = 2 * UNIT * (n + 2) * v.abs().mean(-1, keepdim=True) if kwargs["center"] else torch.zeros(())
    c = v - v.mean(-1, keepdim=True) if kwargs["center"] else v
    relative = 2 * UNIT * (n / 2 + 10) + (m * rstd) ** 2
    w = 1.0 if weight is None else weight.double().abs()
    far = w * (rstd * m + c.abs() * rstd * relative)
    if bias is not None:
        far = far + 2 * UNIT * bias.double().abs()
    mean = m[..., 0] if kwargs["center"] else 0.0
    return [far + once(wanted[0], x.dtype), 0.0, mean, (rstd * relative)[..., 0]]


def _bound_backward(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    """The means of n terms as in `_bound`, then at most 6 roundings of terms; sums over rows likewise."""
    dy, dtotal, x, weight, mean, rstd = args
    n, r = x.shape[-1], rstd.double()[..., None]
    v = (x.double() - (mean.double()[..., None] if kwargs["center"] else 0.0)) * r
    g = dy.double() * (1.0 if weight is None else weight.double())
    shift = g.abs().mean(-1, keepdim=True) if kwargs["center"] else torch.zeros(())
    slope = (g * v).abs().mean(-1, keepdim=True)
    far = r.abs() * (g.abs() + shift + v.abs() * slope) * 2 * UNIT * (n + 12)
    if dtotal is not None:
        far = far + 2 * UNIT * dtotal.double().abs()
    count = 2 * UNIT * (_sizes(x)[0] + 6)
    sums = [(dy.double() * v).abs().reshape(-1, n).sum(0), dy.double().abs().reshape(-1, n).sum(0)]
    wants = (kwargs["want_weight"], kwargs["want_bias"])
    return [
        far + once(wanted[0], x.dtype),
        *(count * s if w else 0.0 for s, w in zip(sums, wants, strict=True)),
    ]


OP = define(
    Kernel(
        name=NAME,
        schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, *, float eps, bool center) "
        "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
        family=FAMILY,
        reference=reference,
        fake=fake,
        native=lambda library: _Library(library).forward,
        triton=lambda module: module.norm,
        backward=_gradient,
        saves=_saves,
        bound=_bound,
    )
)
BACKWARD = define(
    Kernel(
        name=NAME_BACKWARD,
        schema="(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, *, "
        "bool center, bool want_weight, bool want_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        family=FAMILY,
        reference=reference_backward,
        fake=fake_backward,
        native=lambda library: _Library(library).backward,
        triton=lambda module: module.norm_backward,
        bound=_bound_backward,
    )
)
