"""Bias, dropout and residual in one pass; the mask is a function of a seed, so that nothing of it is kept."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code
from ds_kernels.ops.activation import FAMILY, sum_rows, wide
from ds_kernels.registry import Kernel, define, ready
from ds_kernels.rounding import UNIT, once

ROUNDS = 7  # of Philox4x32, the fewest that pass every test of Salmon et al. 2011, table 2
_WORD = 0xFFFFFFFF


def bias_dropout_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    p: float,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """residual + dropout(x + bias, p) in one pass; the backward makes the mask again.

    `seed`: one int64 on x's device; by default it comes from torch's generator, so that torch.manual_seed and
    activation checkpointing repeat it. The same seed makes the same mask in every implementation.
    Shapes: x and residual [..., C] fp32, bf16, fp16 (float64: reference only), bias [C] of any -> like x.
    """
    ready(FAMILY, x.device)
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    made: Tensor = OP(x, bias, residual, seed, p=p if training else 0.0)
    return made


# -- references --------------------------------------------------------------------------------------------


def keeps(numel: int, seed: Tensor, p: float) -> Tensor:
    """Which elements stay: Philox4x32 of each group of 4, under the seed, gives a word for each of them."""
    groups = torch.arange((numel + 3) // 4, device=seed.device)
    zero = torch.zeros_like(groups)
    c0, c1, c2, c3 = groups & _WORD, groups >> 32, zero, zero
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # their low 64 bits, whatever the sign says
        c0, c2 = ((b >> 32) & _WORD) ^ c1 ^ k0, ((a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:numel] >= threshold(p)


def threshold(p: float) -> int:
    """A word below it drops its element."""
    return round(p * 2.0**32)


def scale(p: float) -> float:
    """What is kept is multiplied by this."""
    return 0.0 if p == 1 else 1.0 / (1.0 - p)


def reference(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """residual + dropped(x + bias)."""
    fake(x, bias, residual, seed, p=p)
    v = x.to(wide(x.dtype))
    if bias is not None:
        v = v + bias.to(v.dtype)
    factor = torch.tensor(scale(p), dtype=v.dtype, device=v.device)
    dropped = torch.where(keeps(x.numel(), seed, p).view(x.shape), v * factor, 0)
    return (residual.to(v.dtype) + dropped).to(x.dtype)


def reference_backward(dy: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """The gradient of x."""
    fake_backward(dy, seed, p=p)
    v = dy.to(wide(dy.dtype))
    factor = torch.tensor(scale(p), dtype=v.dtype, device=v.device)
    return torch.where(keeps(dy.numel(), seed, p).view(dy.shape), v * factor, 0).to(dy.dtype)


# -- what fits ---------------------------------------------------------------------------------------------


def _check(op: str, name: str, x: Tensor, seed: Tensor, p: float) -> None:
    check.tensor(op, name, x, dtypes=(*DTYPES, torch.float64), dims=1)
    check.tensor(op, "seed", seed, dtypes=[torch.int64], device=x.device, shape=(1,))
    check.number(op, "p", p, "in [0, 1]", 0 <= p <= 1)


def fake(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """Checks, and what is returned."""
    op = "bias_dropout_add"
    _check(op, "x", x, seed, p)
    check.tensor(op, "residual", residual, dtypes=[x.dtype], device=x.device, shape=x.shape)
    if bias is not None:
        allowed = [torch.float64] if x.dtype == torch.float64 else DTYPES
        check.tensor(op, "bias", bias, dtypes=allowed, device=x.device, shape=x.shape[-1:])
    return x.new_empty(x.shape)


def fake_backward(dy: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """Checks, and what is returned."""
    _check("dropout_backward", "dy", dy, seed, p)
    return dy.new_empty(dy.shape)


# -- gradient ----------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[3])
    ctx.p = keyword_only_inputs["p"]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    bias, seed = ctx.saved_tensors
    dx: Tensor = BACKWARD(dy, seed, p=ctx.p)
    return dx, sum_rows(dx, bias) if ctx.needs_input_grad[1] else None, dy, None


# -- native ------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """DsDropoutCall of sources/activation/activation_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("numel", "cols")),
        *((name, ctypes.c_uint64) for name in ("seed", "threshold")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "threads")),
    )


class _Library:
    """Both ops over the family's library."""

    def __init__(self, library: Native) -> None:
        self._isa = library.isa_code
        self._run = library.function("ds_dropout", ctypes.POINTER(_Call))

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, *, p: float) -> Tensor:
        out = fake(x, bias, residual, seed, p=p)
        if x.dtype == torch.float64:
            return reference(x, bias, residual, seed, p=p)
        self._call(x, bias, residual, seed, p, out)
        return out

    def backward(self, dy: Tensor, seed: Tensor, *, p: float) -> Tensor:
        dx = fake_backward(dy, seed, p=p)
        if dy.dtype == torch.float64:
            return reference_backward(dy, seed, p=p)
        self._call(dy, None, None, seed, p, dx)
        return dx

    def _call(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float, out: Tensor
    ) -> None:
        if x.numel() == 0:
            return
        like = None if bias is None else bias.to(torch.float32).contiguous()
        rest = None if residual is None else residual.contiguous()
        x = x.contiguous()
        at = [None if t is None else t.data_ptr() for t in (x, rest, like, out)]
        word = int(seed) & (2**64 - 1)
        codes = (code(x.dtype), self._isa, torch.get_num_threads())
        self._run(_Call(*at, x.numel(), x.shape[-1], word, threshold(p), scale(p), *codes))


def _bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Three roundings or, fused on a GPU, fewer; of the kept value and of the sum."""
    x, bias, residual, _ = args
    v = x.double().abs() if bias is None else x.double().abs() + bias.double().abs()
    far = 2 * UNIT * (3 * v * scale(kwargs["p"]) + residual.double().abs())
    return [far + once(wanted[0], x.dtype)]


def _bound_backward(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    return [0.0]


OP = define(
    Kernel(
        name="bias_dropout_add",
        schema="(Tensor x, Tensor? bias, Tensor residual, Tensor seed, *, float p) -> Tensor",
        family=FAMILY,
        reference=reference,
        fake=fake,
        native=lambda library: _Library(library).forward,
        triton=lambda module: module.bias_dropout_add,
        backward=_gradient,
        saves=_saves,
        bound=_bound,
    )
)
BACKWARD = define(
    Kernel(
        name="dropout_backward",
        schema="(Tensor dy, Tensor seed, *, float p) -> Tensor",
        family=FAMILY,
        reference=reference_backward,
        fake=fake_backward,
        native=lambda library: _Library(library).backward,
        triton=lambda module: module.dropout_backward,
        bound=_bound_backward,
    )
)
