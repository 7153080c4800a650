"""Softmax cross-entropy of rows of logits: losses, gradient, and both in one pass over memory in place."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code, written
from ds_kernels.ops.cross_entropy_bounds import backward_bound, bound, in_place_bound
from ds_kernels.registry import Kernel, define, ready

FAMILY = "cross_entropy"
Reduction = Literal["mean", "sum", "none"]
_SETTINGS = "*, int ignore_index, float label_smoothing, float z_loss"
IGNORE = -100


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    inplace: bool = False,
) -> Tensor:
    """How unlikely the logits make the targets, in fp32: log sum exp(x) - x[target], over the last dimension.

    `label_smoothing` e: the target counts 1 - e, every class e / V more (Szegedy et al. 2016).
    `z_loss` z: plus z (log sum exp(x))^2, which holds logits near 0 (Chowdhery et al. 2022, section 5).
    `inplace`: the forward pass replaces the logits with their gradient, so that nothing of their size is
    allocated; only for a scalar loss. To score the next token shift the targets, not the logits.
    "mean" is over targets that are not `ignore_index`; over none it is 0, where torch says NaN.
    Shapes: logits [..., V] fp32, bf16, fp16 (float64: reference only), target [...] int64 -> [] or [...].
    Raises: ValueError, also for a target outside [0, V) on the CPU; on a GPU its loss and gradient are NaN.
    """
    settings = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    ready(FAMILY, logits.device)
    if inplace:
        rows = rows_in_place(logits)
        scale = scale_of(target.reshape(-1), ignore_index, reduction, wide(logits.dtype))
        total: Tensor = _InPlace.apply(rows, target.reshape(-1), scale, settings)  # type: ignore[no-untyped-call]
        return total
    rows = logits.reshape(-1, logits.shape[-1]) if logits.dim() else logits
    losses: Tensor = OP(rows, target.reshape(-1), **settings)[0]
    if reduction == "none":
        return losses.view(target.shape)
    return (losses * scale_of(target.reshape(-1), ignore_index, reduction, losses.dtype)).sum()


def rows_in_place(logits: Tensor) -> Tensor:
    """The logits as rows of the same memory. Raises ValueError where that takes a copy."""
    try:
        return logits.view(-1, logits.shape[-1])
    except (RuntimeError, IndexError):
        wanted = "rows of one layout for inplace=True; shift the targets instead of slicing the logits"
        check.refuse("cross_entropy", "logits", logits, wanted)


def scale_of(target: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """What each row counts in a scalar loss; a tensor operation, without waiting for a GPU."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}: allowed are 'mean' and 'sum' here, "
                         "and 'none' without inplace=True")  # fmt: skip
    counts = (target != ignore_index).to(dtype)
    return counts if reduction == "sum" else counts / counts.sum().clamp(min=1)


def times(gradient: Tensor, upstream: Tensor, *, inplace: bool = False) -> Tensor:
    """`gradient * upstream`; itself when the factor can be seen to be 1, which spares a copy of its size."""
    if type(upstream) is Tensor and upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    return gradient.mul_(upstream) if inplace else gradient * upstream


class _InPlace(torch.autograd.Function):
    """The scalar loss; the gradient is made in the forward pass, where the logits were."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, scale: Tensor, settings: dict[str, Any]) -> Tensor:
        losses = IN_PLACE(logits, target, scale, **settings)
        ctx.save_for_backward(logits)
        total: Tensor = (losses * scale).sum()
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return times(gradient, upstream, inplace=True), None, None, None


# -- references --------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    logits: Tensor, target: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps of rows."""
    fake(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
    check_targets("cross_entropy", target, logits.shape[1], ignore_index)
    x, cols = logits.to(wide(logits.dtype)), logits.shape[1]
    lse = torch.logsumexp(x, 1)
    picked = x.gather(1, target.clamp(0, cols - 1)[:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * picked + z_loss * lse.square()
    if label_smoothing:
        losses = losses - label_smoothing / cols * x.sum(1)
    losses = losses.masked_fill((target < 0) | (target >= cols), torch.nan)
    return losses.masked_fill(target == ignore_index, 0), lse


def reference_backward(
    dlosses: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of sum(dlosses * losses) with respect to the logits."""
    _check_backward(dlosses, logits, target, lse, label_smoothing, z_loss)
    check_targets("cross_entropy_backward", target, logits.shape[1], ignore_index)
    cols = logits.shape[1]
    share = (logits.to(lse.dtype) - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
    share -= label_smoothing / cols
    at = target.clamp(0, cols - 1)[:, None]
    share = share.scatter_add(1, at, torch.full_like(at, label_smoothing - 1, dtype=lse.dtype))
    share = (share * dlosses[:, None]).masked_fill(((target < 0) | (target >= cols))[:, None], torch.nan)
    return share.masked_fill((target == ignore_index)[:, None], 0).to(logits.dtype)


def reference_in_place(logits: Tensor, target: Tensor, scale: Tensor, **settings: Any) -> Tensor:
    """The losses; the logits become the gradient of sum(scale * losses)."""
    fake_in_place(logits, target, scale, **settings)
    check_targets("cross_entropy_", target, logits.shape[1], settings["ignore_index"])
    losses, lse = reference(logits, target, **settings)
    logits.copy_(reference_backward(scale, logits, target, lse, **settings))
    return losses


# -- what fits ---------------------------------------------------------------------------------------------


def check_settings(op: str, label_smoothing: float, z_loss: float) -> None:
    """Raise ValueError for a number that does not fit."""
    check.number(op, "label_smoothing", label_smoothing, "in [0, 1]", 0 <= label_smoothing <= 1)
    check.number(op, "z_loss", z_loss, "finite and >= 0", 0 <= z_loss < float("inf"))


def check_targets(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is no class; only on the CPU, where looking does not wait."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        allowed = f"in [0, {classes}) or ignore_index={ignore_index}"
        check.number(op, f"target[{at}]", int(target[at]), allowed, False)


def _check(op: str, logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float) -> None:
    check.tensor(op, "logits", logits, dtypes=(*DTYPES, torch.float64), shape=(None, None))
    if logits.shape[1] == 0:
        check.refuse(op, "logits", logits, "at least one class")
    check.tensor(op, "target", target, dtypes=[torch.int64], device=logits.device, shape=(logits.shape[0],))
    check_settings(op, label_smoothing, z_loss)


def _check_backward(
    dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, label_smoothing: float, z_loss: float
) -> None:
    op, like = "cross_entropy_backward", [wide(logits.dtype)]
    _check(op, logits, target, label_smoothing, z_loss)
    for name, value in (("dlosses", dlosses), ("lse", lse)):
        check.tensor(op, name, value, dtypes=like, device=logits.device, shape=target.shape)


def fake(
    logits: Tensor, target: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Checks, and what is returned."""
    _check("cross_entropy", logits, target, label_smoothing, z_loss)
    losses = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    return losses, torch.empty_like(losses)


def fake_backward(
    dlosses: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Checks, and what is returned."""
    _check_backward(dlosses, logits, target, lse, label_smoothing, z_loss)
    return logits.new_empty(logits.shape)


def fake_in_place(
    logits: Tensor, target: Tensor, scale: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Checks, and what is returned."""
    op, like = "cross_entropy_", wide(logits.dtype)
    _check(op, logits, target, label_smoothing, z_loss)
    check.tensor(op, "scale", scale, dtypes=[like], device=logits.device, shape=target.shape)
    if not is_fake(logits):
        check.apart(op, {"logits": logits, "scale": scale, "target": target}, read=("scale", "target"))
    return logits.new_empty(logits.shape[0], dtype=like)


def is_fake(value: Tensor) -> bool:
    """Has the tensor no memory of its own, as while torch traces?"""
    return type(value) is not Tensor or value.device.type == "meta"


# -- gradient ----------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.settings = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dlosses: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if dlosses is None:
        return None, None
    logits, target, lse = ctx.saved_tensors
    return BACKWARD(dlosses, logits, target, lse, **ctx.settings), None


# -- native ------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """DsCrossEntropyCall of sources/cross_entropy/cross_entropy_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "grad", "target", "scale", "losses", "lse")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "logits_stride", "grad_stride", "ignore")),
        *((name, ctypes.c_float) for name in ("smoothing", "z_loss")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "threads")),
    )


class _Library:
    """The three ops over the family's library."""

    def __init__(self, library: Native) -> None:
        self._isa = library.isa_code
        self._run = library.function("ds_cross_entropy", ctypes.POINTER(_Call))

    def forward(self, logits: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        losses, lse = fake(logits, target, **settings)
        check_targets("cross_entropy", target, logits.shape[1], settings["ignore_index"])
        if logits.dtype == torch.float64:
            return reference(logits, target, **settings)
        self._call(logits, None, target, None, losses, lse, settings)
        return losses, lse

    def backward(
        self, dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, **settings: Any
    ) -> Tensor:
        grad = fake_backward(dlosses, logits, target, lse, **settings)
        check_targets("cross_entropy_backward", target, logits.shape[1], settings["ignore_index"])
        if logits.dtype == torch.float64:
            return reference_backward(dlosses, logits, target, lse, **settings)
        self._call(logits, grad, target, dlosses, None, lse, settings)
        return grad

    def in_place(self, logits: Tensor, target: Tensor, scale: Tensor, **settings: Any) -> Tensor:
        losses = fake_in_place(logits, target, scale, **settings)
        check_targets("cross_entropy_", target, logits.shape[1], settings["ignore_index"])
        if logits.dtype == torch.float64:
            return reference_in_place(logits, target, scale, **settings)
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        self._call(rows, rows, target, scale, losses, torch.empty_like(losses), settings)
        if rows is logits:
            written([logits])
        else:
            logits.copy_(rows)
        return losses

    def _call(
        self,
        logits: Tensor,
        grad: Tensor | None,
        target: Tensor,
        scale: Tensor | None,
        losses: Tensor | None,
        lse: Tensor,
        settings: dict[str, Any],
    ) -> None:
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        keep = (target.contiguous(), scale.contiguous() if scale is not None else None, lse.contiguous())
        self._run(
            _Call(
                rows.data_ptr(), _pointer(grad), keep[0].data_ptr(), _pointer(keep[1]), _pointer(losses),
                keep[2].data_ptr(), *rows.shape, rows.stride(0), 0 if grad is None else grad.stride(0),
                settings["ignore_index"], settings["label_smoothing"], settings["z_loss"],
                code(logits.dtype), self._isa, torch.get_num_threads(),
            )
        )  # fmt: skip


def _pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


# -- the ops -----------------------------------------------------------------------------------------------

OP = define(
    Kernel(
        name="cross_entropy",
        schema=f"(Tensor logits, Tensor target, {_SETTINGS}) -> (Tensor losses, Tensor lse)",
        family=FAMILY,
        reference=reference,
        fake=fake,
        native=lambda library: _Library(library).forward,
        triton=lambda module: module.cross_entropy,
        backward=_gradient,
        saves=_saves,
        bound=bound,
    )
)
BACKWARD = define(
    Kernel(
        name="cross_entropy_backward",
        schema=f"(Tensor dlosses, Tensor logits, Tensor target, Tensor lse, {_SETTINGS}) -> Tensor",
        family=FAMILY,
        reference=reference_backward,
        fake=fake_backward,
        native=lambda library: _Library(library).backward,
        triton=lambda module: module.cross_entropy_backward,
        bound=backward_bound,
    )
)
IN_PLACE = define(
    Kernel(
        name="cross_entropy_",
        schema=f"(Tensor(a!) logits, Tensor target, Tensor scale, {_SETTINGS}) -> Tensor losses",
        family=FAMILY,
        reference=reference_in_place,
        fake=fake_in_place,
        native=lambda library: _Library(library).in_place,
        triton=lambda module: module.cross_entropy_in_place,
        bound=in_place_bound,
    )
)
