"""The last linear layer and cross-entropy in one, in chunks of tokens: never all logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES
from ds_kernels.ops import cross_entropy as rows
from ds_kernels.ops.cross_entropy import IGNORE, Reduction, scale_of, times, wide
from ds_kernels.ops.cross_entropy_bounds import far_gradient, far_losses
from ds_kernels.registry import Kernel, define, ready
from ds_kernels.rounding import UNIT, once

NAME, NAME_EACH = "linear_cross_entropy", "linear_cross_entropy_each"
_SETTINGS = "int ignore_index, float label_smoothing, float z_loss, int chunk"
_CPU_BYTES, _GPU_BYTES = 32 << 20, 256 << 20  # logits of one chunk
_SLICE = 4096  # rows of the weight whose low-precision gradient is made at once, to be added in fp32


def linear_cross_entropy(  # noqa: PLR0913 - linear's arguments and cross_entropy's
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), target)`, with the logits of `chunk` tokens in memory.

    Gradients are made in the forward pass, while a chunk's logits are there, in fp32, and multiplied by the
    loss's own gradient in the backward; with reduction="none" a chunk's logits are computed again. The
    matrix products are torch's. Under autocast hidden, weight and bias are cast as by a linear layer.
    "mean" is over targets that are not `ignore_index`; over none it is 0, where torch says NaN.
    Shapes: hidden [..., H], weight [V, H], bias [V], all fp32, bf16 or fp16 (float64: reference only), target
    [...] int64 -> [] or [...] fp32.
    Raises: ValueError, also for a target outside [0, V) on the CPU; on a GPU its loss and gradients are NaN.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    ready(rows.FAMILY, hidden.device)
    flat = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() else hidden
    settings = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    if chunk is None:
        chunk = tokens_at_once(flat.shape[0], weight)
    if reduction == "none":
        losses: Tensor = EACH(flat, weight, bias, target.reshape(-1), **settings, chunk=chunk)
        return losses.view(target.shape)
    scale = scale_of(target.reshape(-1), ignore_index, reduction, wide(hidden.dtype))
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    total: Tensor = OP(flat, weight, bias, target.reshape(-1), scale, **settings, chunk=chunk, grads=wanted)[
        0
    ]
    return total


def tokens_at_once(tokens: int, weight: Tensor) -> int:
    """A sixteenth of the tokens, if that is enough to keep the matrix products busy and fits the budget."""
    fits = (_GPU_BYTES if weight.is_cuda else _CPU_BYTES) // max(1, weight.shape[0] * weight.element_size())
    return max(64, min(fits, max(tokens // 16, 128)))


# -- the reference: all logits at once ---------------------------------------------------------------------


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    *,
    chunk: int,
    grads: bool,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """sum(scale * losses), losses, and the gradients of that sum, or empty ones without `grads`."""
    made = fake(hidden, weight, bias, target, scale, chunk=chunk, grads=grads, **settings)
    rows.check_targets(NAME, target, weight.shape[0], settings["ignore_index"])
    h, w = hidden.to(scale.dtype), weight.to(scale.dtype)
    logits = h @ w.T if bias is None else h @ w.T + bias.to(scale.dtype)
    losses, lse = rows.reference(logits, target, **settings)
    total = (losses * scale).sum()
    if not grads:
        return (total, losses, *made[2:])
    g = rows.reference_backward(scale, logits, target, lse, **settings)
    return total, losses, g @ w, g.T @ h, made[4] if bias is None else g.sum(0)


def reference_each(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, chunk: int, **settings: Any
) -> Tensor:
    """The losses."""
    fake_each(hidden, weight, bias, target, chunk=chunk, **settings)
    scale = torch.ones(target.shape, dtype=wide(hidden.dtype), device=target.device)
    return reference(hidden, weight, bias, target, scale, chunk=chunk, grads=False, **settings)[1]


# -- what fits ---------------------------------------------------------------------------------------------


def _check(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    chunk: int,
    settings: dict[str, Any],
) -> None:
    check.tensor(op, "hidden", hidden, dtypes=(*DTYPES, torch.float64), shape=(None, None))
    like, device = [hidden.dtype], hidden.device
    check.tensor(op, "weight", weight, dtypes=like, device=device, shape=(None, hidden.shape[1]))
    if weight.shape[0] == 0:
        check.refuse(op, "weight", weight, "at least one class")
    if bias is not None:
        check.tensor(op, "bias", bias, dtypes=like, device=device, shape=weight.shape[:1])
    check.tensor(op, "target", target, dtypes=[torch.int64], device=device, shape=hidden.shape[:1])
    check.number(op, "chunk", chunk, ">= 1", chunk >= 1)
    rows.check_settings(op, settings["label_smoothing"], settings["z_loss"])


def fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    *,
    chunk: int,
    grads: bool,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Checks, and what is returned."""
    _check(NAME, hidden, weight, bias, target, chunk, settings)
    like = wide(hidden.dtype)
    check.tensor(NAME, "scale", scale, dtypes=[like], device=hidden.device, shape=target.shape)
    sizes = [hidden.shape, weight.shape, (0,) if bias is None else bias.shape]
    given = [hidden.new_empty(size if grads else (0,), dtype=like) for size in sizes]
    return scale.new_empty(()), scale.new_empty(target.shape), *given


def fake_each(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, chunk: int, **settings: Any
) -> Tensor:
    """Checks, and what is returned."""
    _check(NAME_EACH, hidden, weight, bias, target, chunk, settings)
    return hidden.new_empty(target.shape, dtype=wide(hidden.dtype))


# -- in chunks ---------------------------------------------------------------------------------------------


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    *,
    chunk: int,
    grads: bool,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """The op over torch's matrix products and ds::cross_entropy_ in place on each chunk's logits."""
    _, losses, dhidden, dweight, dbias = fake(
        hidden, weight, bias, target, scale, chunk=chunk, grads=grads, **settings
    )
    rows.check_targets(NAME, target, weight.shape[0], settings["ignore_index"])
    # fp16 would lose what a mean over many tokens makes small: there the largest gradient counts as 1.
    most = scale.abs().sum().clamp(min=torch.finfo(torch.float16).tiny)
    unit = scale / most if hidden.dtype == torch.float16 else scale
    dweight.zero_()
    dbias.zero_()
    buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        h = hidden[part]
        logits = _logits(h, weight, bias, buffer[: h.shape[0]])
        if not grads:
            losses[part] = rows.OP(logits, target[part], **settings)[0]
            continue
        losses[part] = rows.IN_PLACE(logits, target[part], unit[part], **settings)
        dhidden[part] = logits @ weight
        _add_product(dweight, logits, h)
        if bias is not None:
            dbias += logits.sum(0, dtype=dbias.dtype)
    if hidden.dtype == torch.float16:
        for gradient in (dhidden, dweight, dbias):
            gradient *= most
    return (losses * scale).sum(), losses, dhidden, dweight, dbias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(dweight: Tensor, g: Tensor, hidden: Tensor) -> None:
    """dweight += g^T hidden, added in the dtype of `dweight`."""
    if dweight.dtype == g.dtype:
        dweight.addmm_(g.T, hidden)
        return
    for start in range(0, dweight.shape[0], _SLICE):
        part = slice(start, start + _SLICE)
        dweight[part] += g[:, part].T @ hidden


def chunked_each(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, chunk: int, **settings: Any
) -> Tensor:
    """The losses, in chunks."""
    fake_each(hidden, weight, bias, target, chunk=chunk, **settings)
    scale = torch.ones(target.shape, dtype=wide(hidden.dtype), device=target.device)
    return chunked(hidden, weight, bias, target, scale, chunk=chunk, grads=False, **settings)[1]


# -- gradients ---------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.grads = keyword_only_inputs["grads"]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the weight otherwise


def _gradient(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 5
    if not ctx.grads:
        raise RuntimeError(f"{NAME}: a gradient is asked for, but the op was called with grads=False")
    losses, *given = ctx.saved_tensors
    found = [
        times(gradient, dtotal).to(dtype) if needed and dtype is not None else None
        for gradient, dtype, needed in zip(given, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *found, None, losses * dtotal


def _saves_each(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.settings = keyword_only_inputs


def _gradient_each(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the logits again, now that it is known what each loss counts."""
    inputs = ctx.saved_tensors
    given = OP(*inputs, dlosses.contiguous(), **ctx.settings, grads=True)[2:]
    found = [None if t is None else g.to(t.dtype) for t, g in zip(inputs, given, strict=False)]
    return *found, None


# -- how far from the reference ----------------------------------------------------------------------------


def _far_logits(args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The logits in double, and how far two of them may part: H products and sums, and one rounding each."""
    hidden, weight, bias = args[0].double(), args[1].double(), args[2]
    logits, size = hidden @ weight.T, hidden.abs() @ weight.abs().T
    if bias is not None:
        logits, size = logits + bias.double(), size + bias.double().abs()
    return logits, 2 * UNIT * (hidden.shape[1] + 2) * size + once(logits, args[0].dtype)


def _bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Logits that are `far` off move a loss by twice that, and a probability by as much of itself."""
    settings = {name: kwargs[name] for name in ("label_smoothing", "z_loss")}
    logits, far = _far_logits(args)
    target, scale, dtype = args[3], args[4].double().abs(), args[0].dtype
    most = far.amax(1)
    slope = 2 + 2 * kwargs["z_loss"] * torch.logsumexp(logits, 1).abs()
    losses = far_losses(logits, settings) + most * slope
    terms = (scale * wanted[1].double().abs()).sum()
    total = (scale * losses).sum() + 2 * UNIT * (len(target) + 1) * terms
    if not kwargs["grads"]:
        return [total, losses, *(torch.zeros(0) for _ in range(3))]
    # e^(2 far) - 1 of a probability, for both lse and the logit; then the gradient is rounded to its dtype.
    dlogits = far_gradient(logits, target, scale, settings, torch.expm1(2 * most))
    g = scale[:, None] * slope[:, None]  # no gradient of a logit is larger
    dlogits = dlogits + g * torch.finfo(dtype).eps + (scale.sum() * 2.0**-24 if dtype == torch.float16 else 0)
    hidden, weight = args[0].double().abs(), args[1].double().abs()
    size = g.expand_as(logits)
    depth = 2 * UNIT * (sum(logits.shape) + 4) + 2 * torch.finfo(dtype).eps
    dhidden = dlogits @ weight + depth * (size @ weight)
    dweight = dlogits.T @ hidden + depth * (size.T @ hidden)
    dbias = dlogits.sum(0) + depth * size.sum(0) if args[2] is not None else torch.zeros(0)
    return [total, losses, dhidden, dweight, dbias]


def _bound_each(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Tensor]:
    scale = torch.ones(len(args[3]), dtype=torch.float64)
    return [_bound((*args, scale), {**kwargs, "grads": False}, [wanted[0].sum(), wanted[0]])[1]]


OP = define(
    Kernel(
        name=NAME,
        schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor scale, *, {_SETTINGS}, "
        "bool grads) -> (Tensor total, Tensor losses, Tensor dhidden, Tensor dweight, Tensor dbias)",
        family=rows.FAMILY,
        reference=reference,
        fake=fake,
        torch={"cpu": chunked, "cuda": chunked},
        backward=_gradient,
        saves=_saves,
        bound=_bound,
    )
)
EACH = define(
    Kernel(
        name=NAME_EACH,
        schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, *, {_SETTINGS}) -> Tensor",
        family=rows.FAMILY,
        reference=reference_each,
        fake=fake_each,
        torch={"cpu": chunked_each, "cuda": chunked_each},
        backward=_gradient_each,
        saves=_saves_each,
        bound=_bound_each,
    )
)
