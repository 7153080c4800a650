"""Linear layers for decoding: weights in 8, 4 or 6 bits with scales, activations in 16 or 32, and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_kernels.ops.linear_check import NAMES, check_bf16, check_dequantize, check_linear
from ds_kernels.ops.linear_native import make_native, make_native_bf16, make_native_dequantize
from ds_kernels.packed import Bits, PackedLinear, unpack
from ds_kernels.registry import Kernel, define, ready

_SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group, int columns) -> Tensor"
)


def quant_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """x times the packed weight, transposed, plus bias: products and sums in fp32, rounded once to x's dtype.

    The weight is frozen; x and bias have gradients (through the weight in x's dtype).
    Shapes: x [..., in] fp32, bf16 or fp16 -> [..., out] of the same dtype; bias [out].
    Raises: ValueError naming the argument, what it is and what it should be.
    """
    ready("linear", x.device)
    out: Tensor = OPS[packed.bits](
        x, packed.codes, packed.scales, packed.zeros, bias, packed.group, packed.in_features
    )
    return out


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear in bf16, faster for the few rows of decoding.

    Shapes: x [..., in], weight [out, in], both bf16 -> [..., out]; bias [out].
    """
    ready("linear", x.device)
    out: Tensor = BF16(x, weight, bias)
    return out


def dequantize_linear(packed: PackedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in], each element computed in fp32 and rounded once to `dtype`."""
    ready("linear", packed.codes.device)
    out: Tensor = DEQUANTIZE(
        packed.codes, packed.scales, packed.zeros, packed.bits, packed.group, packed.in_features, dtype
    )
    return out


# -- references --------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = weight.dtype
    y = x.to(wide) @ weight.mT
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def make_reference(bits: Bits) -> Callable[..., Tensor]:
    """The op in plain torch: the weight in fp32, one product in fp32, one rounding."""

    def reference(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        group: int,
        columns: int,
    ) -> Tensor:
        check_linear(bits, x, codes, scales, zeros, bias, group, columns)
        weight = unpack(codes, scales, zeros, bits, group, columns, _wide(x.dtype))
        return _dense(x, weight, bias)

    return reference


def reference_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear_bf16 in plain torch: in fp32, rounded once."""
    check_bf16(x, weight, bias)
    return _dense(x, weight.to(_wide(x.dtype)), bias)


def reference_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """linear_dequantize in plain torch."""
    known = check_dequantize(codes, scales, zeros, bits, group, columns, dtype)
    return unpack(codes, scales, zeros, known, group, columns, _wide(dtype)).to(dtype)


# -- while torch traces ------------------------------------------------------------------------------------


def make_fake(bits: Bits) -> Callable[..., Tensor]:
    """The op while torch traces."""

    def fake(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        group: int,
        columns: int,
    ) -> Tensor:
        check_linear(bits, x, codes, scales, zeros, bias, group, columns)
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    return fake


def fake_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear_bf16 while torch traces."""
    check_bf16(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def fake_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """linear_dequantize while torch traces."""
    check_dequantize(codes, scales, zeros, bits, group, columns, dtype)
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


# -- gradients ---------------------------------------------------------------------------------------------


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the packed weight; x is not needed, for the weight has no gradient."""
    _, codes, scales, zeros, bias, group, columns = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.group, ctx.columns = group, columns
    ctx.bias_dtype = None if bias is None else bias.dtype


def make_backward(bits: Bits) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of x and bias: through the weight, rounded to the gradient's dtype."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, zeros = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ DEQUANTIZE(codes, scales, zeros, bits, ctx.group, ctx.columns, grad.dtype)
        if ctx.needs_input_grad[4]:
            to_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
        return to_x, None, None, None, to_bias, None, None

    return backward


def save_bf16(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the gradients need."""
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_bf16(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias."""
    x, weight = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = grad @ weight
    if ctx.needs_input_grad[1]:
        to_weight = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        to_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return to_x, to_weight, to_bias


# -- how far implementations may be from the reference -------------------------------------------------------


def _bound(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, rounded: bool) -> Tensor:
    """Of two sums of k products and a bias, each in an order of its own, and each rounded once.

    A sum of k rounded products in fp32 is within gamma(k) * sum |x| |w| of the true one (Higham 2002, 3.1);
    dequantising, scaling and bias add four roundings. `rounded`: one of them takes weights rounded to bf16.
    bf16 dot products take subnormal numbers for zero, which k times the smallest normal one covers.
    """
    a, b = x.double().abs(), weight.double().abs()
    size = a @ b.mT + (0.0 if bias is None else bias.double().abs())
    k = x.shape[-1] + 4
    unit = {torch.float64: 2.0**-53}.get(x.dtype, 2.0**-24)
    apart = 2 * k * unit / (1 - k * unit) * size + (2.0**-8 * size if rounded else 0.0)
    if x.dtype != torch.float64 and size.numel() and a.numel():
        apart = apart + torch.finfo(torch.float32).tiny * k * (1 + a.max() + b.max())
    last = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(x.dtype, unit)
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return apart * (1 + last) + 2 * last * wanted.double().abs() + smallest


def make_bound(bits: Bits) -> Callable[..., list[Tensor]]:
    """The bound of a quantised linear."""

    def bound(args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Tensor]) -> list[Tensor]:
        x, codes, scales, zeros, bias, group, columns = args
        weight = unpack(codes, scales, zeros, bits, group, columns, torch.float64)
        many = wanted[0].numel() // max(1, codes.shape[0]) >= 32  # may go the dense way
        rounded = x.dtype == torch.bfloat16 and (scales.shape[1] > 1 or many)
        return [_bound(x, weight, bias, wanted[0], rounded)]

    return bound


def bound_dequantize(args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Tensor]) -> list[float]:
    """The same bits, but for numbers below the smallest normal one, which may be zero."""
    return [float(torch.finfo(torch.float32).smallest_normal)]


def bound_bf16(args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Tensor]) -> list[Tensor]:
    """The bound of linear_bf16."""
    x, weight, bias = args
    return [_bound(x, weight, bias, wanted[0], False)]


def _define(bits: Bits) -> Callable[..., Any]:
    return define(
        Kernel(
            name=NAMES[bits],
            schema=_SCHEMA,
            family="linear",
            reference=make_reference(bits),
            fake=make_fake(bits),
            native=lambda library: make_native(library, bits, make_reference(bits)),
            triton=lambda module: module.make_linear(bits),
            backward=make_backward(bits),
            saves=save,
            bound=make_bound(bits),
        )
    )


def _torch_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_bf16(x, weight, bias)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


OPS: dict[Bits, Callable[..., Any]] = {bits: _define(bits) for bits in NAMES}
BF16 = define(
    Kernel(
        name="linear_bf16",
        schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        family="linear",
        reference=reference_bf16,
        fake=fake_bf16,
        native=lambda library: make_native_bf16(library, reference_bf16),
        torch={"cuda": _torch_bf16},
        backward=backward_bf16,
        saves=save_bf16,
        bound=bound_bf16,
    )
)
DEQUANTIZE = define(
    Kernel(
        name="linear_dequantize",
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int columns, "
            "ScalarType dtype) -> Tensor"
        ),
        family="linear",
        reference=reference_dequantize,
        fake=fake_dequantize,
        native=lambda library: make_native_dequantize(library, reference_dequantize),
        triton=lambda module: module.dequantize,
        bound=bound_dequantize,
    )
)
