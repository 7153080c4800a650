"""SiLU and GELU, gated or after a bias, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code
from ds_kernels.registry import Kernel, define, ready
from ds_kernels.rounding import UNIT, once

FAMILY = "activation"
KINDS = ("silu", "gelu", "gelu_tanh")
GeluKind = Literal["gelu", "gelu_tanh"]


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up in one pass (Shazeer 2020, equation 5); without `up`, the halves of one packed tensor.

    Shapes: [..., C] each, or gate [..., 2 C] with the gate first -> [..., C]; fp32, bf16, fp16 (float64:
    reference only). The gradient of a packed tensor is packed.
    """
    ready(FAMILY, gate.device)
    made: Tensor = GLU(gate, up, kind="silu")
    return made


def geglu(gate: Tensor, up: Tensor | None = None, *, kind: GeluKind = "gelu") -> Tensor:
    """gelu(gate) * up in one pass (Shazeer 2020, equation 5). Shapes: as `swiglu`."""
    ready(FAMILY, gate.device)
    made: Tensor = GLU(gate, up, kind=kind)
    return made


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, kind: GeluKind = "gelu") -> Tensor:
    """gelu(x + bias) in one pass: x P(x), with P the normal distribution function, or its tanh form.

    Hendrycks and Gimpel 2016. Shapes: x [..., C] fp32, bf16, fp16 (float64: reference only), bias [C] of any.
    """
    ready(FAMILY, x.device)
    made: Tensor = ACT(x, bias, kind=kind)
    return made


# -- references --------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def function(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x), without the cancellation that 1 + tanh and 1 + erf have for negative x."""
    if kind == "gelu":
        p = torch.special.erfc(x * -(0.5**0.5)) * 0.5
        return x * p, p + x * (x.square() * -0.5).exp() * 0.3989422804014327
    inner, slope = (x, torch.ones_like(x)) if kind == "silu" else _tanh_form(x)
    s = inner.sigmoid()
    return x * s, s + x * s * (-inner).sigmoid() * slope


def _tanh_form(x: Tensor) -> tuple[Tensor, Tensor]:
    """u with 0.5 (1 + tanh(u / 2)) = sigmoid(u), and its derivative."""
    c, cubic = 1.5957691216057308, 0.044715
    return c * x * (1 + cubic * x.square()), c * (1 + 3 * cubic * x.square())


def halves(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, of which a packed tensor is made."""
    if up is not None:
        return x, up
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def glu(x: Tensor, up: Tensor | None, *, kind: str) -> Tensor:
    """f(gate) * up."""
    fake_glu(x, up, kind=kind)
    gate, other = halves(x, up)
    like = wide(x.dtype)
    return (function(gate.to(like), kind)[0] * other.to(like)).to(x.dtype)


def glu_backward(dy: Tensor, x: Tensor, up: Tensor | None, *, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, or of the packed tensor and an empty one."""
    _, nothing = fake_glu_backward(dy, x, up, kind=kind)
    gate, other = halves(x, up)
    g = dy.to(wide(x.dtype))
    value, slope = function(gate.to(g.dtype), kind)
    dgate, dup = (g * other.to(g.dtype) * slope).to(x.dtype), (g * value).to(x.dtype)
    return (dgate, dup) if up is not None else (torch.cat([dgate, dup], -1), nothing)


def act(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """f(x + bias)."""
    fake_act(x, bias, kind=kind)
    v = x.to(wide(x.dtype))
    return function(v if bias is None else v + bias.to(v.dtype), kind)[0].to(x.dtype)


def act_backward(dy: Tensor, x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """The gradient of x; that of the bias is its sum over rows."""
    fake_act_backward(dy, x, bias, kind=kind)
    v = x.to(wide(x.dtype))
    slope = function(v if bias is None else v + bias.to(v.dtype), kind)[1]
    return (dy.to(v.dtype) * slope).to(x.dtype)


# -- what fits ---------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, kind: str) -> None:
    check.tensor(op, "x", x, dtypes=(*DTYPES, torch.float64), dims=1)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind={kind!r}: allowed are {', '.join(KINDS)}")


def _check_glu(op: str, x: Tensor, up: Tensor | None, kind: str) -> Sequence[int]:
    """Checks; the shape of what comes out."""
    _check(op, x, kind)
    if up is not None:
        check.tensor(op, "up", up, dtypes=[x.dtype], device=x.device, shape=x.shape)
        return x.shape
    if x.shape[-1] % 2:
        check.refuse(op, "x", x, "an even last dimension, as there is no `up`: gate and up beside each other")
    return (*x.shape[:-1], x.shape[-1] // 2)


def _check_bias(op: str, x: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        allowed = [torch.float64] if x.dtype == torch.float64 else DTYPES
        check.tensor(op, "bias", bias, dtypes=allowed, device=x.device, shape=x.shape[-1:])


def fake_glu(x: Tensor, up: Tensor | None, *, kind: str) -> Tensor:
    """Checks, and what is returned."""
    return x.new_empty(_check_glu("glu", x, up, kind))


def fake_glu_backward(dy: Tensor, x: Tensor, up: Tensor | None, *, kind: str) -> tuple[Tensor, Tensor]:
    """Checks, and what is returned."""
    shape = _check_glu("glu_backward", x, up, kind)
    check.tensor("glu_backward", "dy", dy, dtypes=[x.dtype], device=x.device, shape=shape)
    return x.new_empty(x.shape), x.new_empty((0,) if up is None else up.shape)


def fake_act(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """Checks, and what is returned."""
    _check("act", x, kind)
    _check_bias("act", x, bias)
    return x.new_empty(x.shape)


def fake_act_backward(dy: Tensor, x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """Checks, and what is returned."""
    _check("act_backward", x, kind)
    _check_bias("act_backward", x, bias)
    check.tensor("act_backward", "dy", dy, dtypes=[x.dtype], device=x.device, shape=x.shape)
    return x.new_empty(x.shape)


# -- gradients ---------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.kind = keyword_only_inputs["kind"]


def _gradient_glu(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, up = ctx.saved_tensors
    dx, dup = GLU_BACKWARD(dy, x, up, kind=ctx.kind)
    return dx, None if up is None else dup


def _gradient_act(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx: Tensor = ACT_BACKWARD(dy, x, bias, kind=ctx.kind)
    return dx, sum_rows(dx, bias) if ctx.needs_input_grad[1] else None


def sum_rows(dx: Tensor, like: Tensor) -> Tensor:
    """The sum over all but the last dimension, in fp32, in the dtype of a bias."""
    return dx.reshape(-1, dx.shape[-1]).sum(0, dtype=wide(dx.dtype)).to(like.dtype)


# -- native ------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """DsActivationCall of sources/activation/activation_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "up", "dy", "bias", "out", "dup")),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("x", "up", "dy", "out", "dup")),
        *((name, ctypes.c_int32) for name in ("kind", "dtype", "isa", "threads")),
    )


class _Library:
    """The four ops over the family's library."""

    def __init__(self, library: Native) -> None:
        self._isa = library.isa_code
        self._run = library.function("ds_activation", ctypes.POINTER(_Call))

    def glu(self, x: Tensor, up: Tensor | None, *, kind: str) -> Tensor:
        out = fake_glu(x, up, kind=kind)
        if x.dtype == torch.float64:
            return glu(x, up, kind=kind)
        gate, other = halves(x, up)
        self._call(kind, x=gate, up=other, out=out)
        return out

    def glu_backward(self, dy: Tensor, x: Tensor, up: Tensor | None, *, kind: str) -> tuple[Tensor, Tensor]:
        dx, dup = fake_glu_backward(dy, x, up, kind=kind)
        if x.dtype == torch.float64:
            return glu_backward(dy, x, up, kind=kind)
        (gate, other), (dgate, dother) = halves(x, up), halves(dx, None if up is None else dup)
        self._call(kind, x=gate, up=other, dy=dy, out=dgate, dup=dother)
        return dx, dup

    def act(self, x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
        out = fake_act(x, bias, kind=kind)
        if x.dtype == torch.float64:
            return act(x, bias, kind=kind)
        self._call(kind, x=x, bias=bias, out=out)
        return out

    def act_backward(self, dy: Tensor, x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
        dx = fake_act_backward(dy, x, bias, kind=kind)
        if x.dtype == torch.float64:
            return act_backward(dy, x, bias, kind=kind)
        self._call(kind, x=x, dy=dy, bias=bias, out=dx)
        return dx

    def _call(self, kind: str, *, bias: Tensor | None = None, **given: Tensor) -> None:
        if given["x"].numel() == 0:
            return
        rows = {name: rows_of(value) for name, value in given.items()}
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        names = ("x", "up", "dy", "out", "dup")
        at = [rows[name].data_ptr() if name in rows else None for name in names]
        at.insert(3, None if bias is None else bias.data_ptr())
        strides = [rows[name].stride(0) if name in rows else 0 for name in names]
        x = rows["x"]
        self._run(
            _Call(
                *at, *x.shape, *strides, KINDS.index(kind), code(x.dtype), self._isa, torch.get_num_threads()
            )
        )


def rows_of(value: Tensor) -> Tensor:
    """As rows whose elements are neighbours: a view, where the layout allows it, of which halves are one."""
    if value.stride(-1) == 1 or value.shape[-1] == 1:
        try:
            return value.view(-1, value.shape[-1])
        except RuntimeError:
            pass
    return value.reshape(-1, value.shape[-1]).contiguous()


# -- how far from the reference ----------------------------------------------------------------------------


def _far(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """How far two f(x), and two f'(x), may part: see activation_loop.h for the exponential and the fit.

    The argument of the exponential is off by `inner` units, and so is what it makes, relatively; the rest is
    at most 20 units, of every term of the sum that the slope is. Arguments past 104, where the exponential is
    0, need no more than the 640 units of that. Below 2^-126 steps are absolute.
    """
    value, slope = function(x, kind)
    inner = x.square() if kind == "gelu" else 6 * _tanh_form(x)[0].abs() if kind == "gelu_tanh" else x.abs()
    units = 2 * UNIT * (20 + inner.clamp(max=640))
    terms = slope.abs() + 2 * value.abs() * (1 if kind == "silu" else 2 + x.square())
    tiny = 2.0**-125 * (1 + x.abs())
    return units * value.abs() + tiny, units * terms + tiny


def _bound_glu(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    gate, up = halves(args[0], args[1])
    far = _far(gate.double(), kwargs["kind"])[0] * up.double().abs()
    return [far + once(wanted[0], args[0].dtype)]


def _bound_glu_backward(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    dy, (gate, up) = args[0].double().abs(), halves(args[1], args[2])
    value, slope = _far(gate.double(), kwargs["kind"])
    far = [dy * up.double().abs() * slope, dy * value]
    if args[2] is None:
        return [torch.cat(far, -1) + once(wanted[0], gate.dtype), 0.0]
    return [f + once(w, gate.dtype) for f, w in zip(far, wanted, strict=True)]


def _bound_act(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    x, bias = args
    v = x.double() if bias is None else (x.float() + bias.float()).double()  # one rounding, the same for all
    return [_far(v, kwargs["kind"])[0] + once(wanted[0], x.dtype)]


def _bound_act_backward(
    args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]
) -> list[Tensor]:
    dy, x, bias = args
    v = x.double() if bias is None else (x.float() + bias.float()).double()
    return [dy.double().abs() * _far(v, kwargs["kind"])[1] + once(wanted[0], x.dtype)]


GLU = define(
    Kernel(
        name="glu",
        schema="(Tensor x, Tensor? up, *, str kind) -> Tensor",
        family=FAMILY,
        reference=glu,
        fake=fake_glu,
        native=lambda library: _Library(library).glu,
        triton=lambda module: module.glu,
        backward=_gradient_glu,
        saves=_saves,
        bound=_bound_glu,
    )
)
GLU_BACKWARD = define(
    Kernel(
        name="glu_backward",
        schema="(Tensor dy, Tensor x, Tensor? up, *, str kind) -> (Tensor dx, Tensor dup)",
        family=FAMILY,
        reference=glu_backward,
        fake=fake_glu_backward,
        native=lambda library: _Library(library).glu_backward,
        triton=lambda module: module.glu_backward,
        bound=_bound_glu_backward,
    )
)
ACT = define(
    Kernel(
        name="act",
        schema="(Tensor x, Tensor? bias, *, str kind) -> Tensor",
        family=FAMILY,
        reference=act,
        fake=fake_act,
        native=lambda library: _Library(library).act,
        triton=lambda module: module.act,
        backward=_gradient_act,
        saves=_saves,
        bound=_bound_act,
    )
)
ACT_BACKWARD = define(
    Kernel(
        name="act_backward",
        schema="(Tensor dy, Tensor x, Tensor? bias, *, str kind) -> Tensor",
        family=FAMILY,
        reference=act_backward,
        fake=fake_act_backward,
        native=lambda library: _Library(library).act_backward,
        triton=lambda module: module.act_backward,
        bound=_bound_act_backward,
    )
)
