"""Activations and dropout on GPUs: a program for each block of a row, or of a tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops import activation as op
from ds_kernels.ops import dropout as chance
from ds_kernels.sources.common.gpu import rounded

BLOCK = 1024
ROUNDS = tl.constexpr(chance.ROUNDS)


@triton.jit
def function_of(x, KIND: tl.constexpr):
    """f(x) and f'(x), as activation_loop.h has them. KIND: place in ops.activation.KINDS."""
    if KIND == 1:
        z = tl.abs(x)
        e = tl.exp(-0.5 * (z * z))
        t = 1.0 / (1.0 + 0.282842712 * z)
        q = 0.021184833720326424 * t - 0.07288750261068344
        q = q * t + 0.047657426446676254
        q = q * t + 0.03747323155403137
        q = q * t + 0.04439357668161392
        q = q * t + 0.09476622194051743
        q = q * t + 0.10143901407718658
        q = q * t + 0.11315203458070755
        q = q * t + 0.11282119899988174
        tail = e * (t * q)
        p = tl.where(x < 0.0, tail, 1.0 - tail)
        value = x * p
        slope = p + x * (e * 0.398942280)
    else:
        inner = x
        outer = 1.0
        if KIND == 2:
            square = x * x
            inner = 1.59576912 * x * (1.0 + 0.044715 * square)
            outer = 1.59576912 * (1.0 + 0.134145 * square)
        s = 1.0 / (1.0 + tl.exp(-inner))
        value = x * s
        slope = s + value * (1.0 - s) * outer
    return value, slope


@triton.jit
def activate(
    x, up, dy, bias, out, dup, cols, x_stride, up_stride, dy_stride, out_stride, dup_stride, blocks,
    KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a row, forward or backward."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < cols
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = function_of(v, KIND)
    if GATED:
        other = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            tl.store(dup + row * dup_stride + at, rounded(g * value, dup.dtype.element_ty), mask=inside)
            g *= other
        made = g * slope
    else:
        made = value
        if GATED:
            made *= other
    tl.store(out + row * out_stride + at, rounded(made, out.dtype.element_ty), mask=inside)


@triton.jit
def drop(
    x, residual, bias, out, seed, numel, cols, threshold, scale, ADD: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a tensor: four elements for each call of the generator."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    group = start // 4 + tl.arange(0, BLOCK // 4)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    c0, c1, c2, c3 = tl.philox(tl.load(seed), low, high, zero, zero, ROUNDS)
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + at % cols, mask=inside, other=0.0).to(tl.float32)
    made = tl.where(words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold, v * scale, 0.0)
    if ADD:
        made += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(made, out.dtype.element_ty), mask=inside)


def glu(x: Tensor, up: Tensor | None, *, kind: str) -> Tensor:
    """ds::glu."""
    out = op.fake_glu(x, up, kind=kind)
    if x.dtype == torch.float64:
        return op.glu(x, up, kind=kind)
    gate, other = op.halves(x, up)
    _run(kind, x=gate, up=other, out=out)
    return out


def glu_backward(dy: Tensor, x: Tensor, up: Tensor | None, *, kind: str) -> tuple[Tensor, Tensor]:
    """ds::glu_backward."""
    dx, dup = op.fake_glu_backward(dy, x, up, kind=kind)
    if x.dtype == torch.float64:
        return op.glu_backward(dy, x, up, kind=kind)
    (gate, other), (dgate, dother) = op.halves(x, up), op.halves(dx, None if up is None else dup)
    _run(kind, x=gate, up=other, dy=dy, out=dgate, dup=dother)
    return dx, dup


def act(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """ds::act."""
    out = op.fake_act(x, bias, kind=kind)
    if x.dtype == torch.float64:
        return op.act(x, bias, kind=kind)
    _run(kind, bias, x=x, out=out)
    return out


def act_backward(dy: Tensor, x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """ds::act_backward."""
    dx = op.fake_act_backward(dy, x, bias, kind=kind)
    if x.dtype == torch.float64:
        return op.act_backward(dy, x, bias, kind=kind)
    _run(kind, bias, x=x, dy=dy, out=dx)
    return dx


def _run(kind: str, bias: Tensor | None = None, **given: Tensor) -> None:
    if given["x"].numel() == 0:
        return
    rows = {name: op.rows_of(value) for name, value in given.items()}
    x = rows["x"]
    names = ("x", "up", "dy", "out", "dup")
    up, dy, out, dup = (rows.get(name, x) for name in names[1:])
    blocks = triton.cdiv(x.shape[1], BLOCK)
    activate[(x.shape[0] * blocks,)](
        x, up, dy, x if bias is None else bias.contiguous(), out, dup, x.shape[1],
        *(rows[name].stride(0) if name in rows else 0 for name in names), blocks, KIND=op.KINDS.index(kind),
        GATED="up" in rows, BIAS=bias is not None, BACKWARD="dy" in rows, BLOCK=BLOCK,
    )  # fmt: skip


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """ds::bias_dropout_add."""
    out = chance.fake(x, bias, residual, seed, p=p)
    if x.dtype == torch.float64:
        return chance.reference(x, bias, residual, seed, p=p)
    _drop(x, bias, residual, seed, p, out)
    return out


def dropout_backward(dy: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """ds::dropout_backward."""
    dx = chance.fake_backward(dy, seed, p=p)
    if dy.dtype == torch.float64:
        return chance.reference_backward(dy, seed, p=p)
    _drop(dy, None, None, seed, p, dx)
    return dx


def _drop(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, p: float, out: Tensor
) -> None:
    if x.numel() == 0:
        return
    x = x.contiguous()
    drop[(triton.cdiv(x.numel(), BLOCK),)](
        x, x if residual is None else residual.contiguous(), x if bias is None else bias.contiguous(), out,
        seed, x.numel(), x.shape[-1], chance.threshold(p), chance.scale(p), ADD=residual is not None,
        BIAS=bias is not None, BLOCK=BLOCK,
    )  # fmt: skip


def _activate_variant(dtype: str, kind: int, gated: bool, backward: bool) -> Variant:
    signature = dict.fromkeys(("x", "up", "dy", "bias", "out", "dup"), f"*{dtype}") | {"cols": "i32"}
    names = ("x_stride", "up_stride", "dy_stride", "out_stride", "dup_stride", "blocks")
    signature |= dict.fromkeys(names, "i64")
    constants = {"KIND": kind, "GATED": gated, "BIAS": not gated, "BACKWARD": backward, "BLOCK": BLOCK}
    return Variant(activate, signature, constants)


def _drop_variant(dtype: str, add: bool) -> Variant:
    signature = dict.fromkeys(("x", "residual", "bias", "out"), f"*{dtype}") | {"seed": "*i64"}
    signature |= dict.fromkeys(("numel", "cols", "threshold"), "i64") | {"scale": "fp32"}
    return Variant(drop, signature, {"ADD": add, "BIAS": add, "BLOCK": BLOCK})


VARIANTS = [
    *(_activate_variant("bf16", kind, True, True) for kind in range(3)),
    *(_activate_variant("bf16", 1, gated, False) for gated in (False, True)),
    *(_activate_variant(dtype, 1, dtype == "fp32", True) for dtype in ("fp32", "fp16")),
    *(_drop_variant(dtype, dtype != "fp32") for dtype in ("fp32", "bf16", "fp16")),
]
