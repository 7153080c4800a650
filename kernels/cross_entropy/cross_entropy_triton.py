"""Cross entropy on GPUs: a program for each row of logits, which reads it once more for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels.cubins import Variant
from ds_kernels.ops import cross_entropy as op
from ds_kernels.sources.common.gpu import rounded

BLOCK = 4096


@triton.jit
def cross_entropy_rows(
    logits, grad, target, scale, losses, lse_of, cols, logits_stride, grad_stride, ignore_index, smoothing,
    z_loss, LOSSES: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a row (LOSSES), and its gradient (GRADIENT), which may go to the row itself."""
    row = tl.program_id(0).to(tl.int64)
    mine = logits + row * logits_stride
    wanted = tl.load(target + row)
    counts = wanted != ignore_index
    known = (wanted >= 0) & (wanted < cols)
    if LOSSES:
        most = -float("inf")
        total = 0.0
        plain = 0.0
        for start in range(0, cols, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(mine + at, mask=at < cols, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(x, 0))
            centre = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(most - centre) + tl.sum(tl.exp(x - centre), 0)
            plain += tl.sum(tl.where(at < cols, x, 0.0), 0)
            most = higher
        lse = tl.where(most == -float("inf"), 0.0, most) + tl.log(total)
        tl.store(lse_of + row, lse)
        picked = tl.load(mine + wanted, mask=known, other=float("nan")).to(tl.float32)
        loss = lse - (1.0 - smoothing) * picked + z_loss * (lse * lse)
        if smoothing != 0.0:
            loss -= smoothing / cols * plain
        tl.store(losses + row, tl.where(counts, loss, 0.0))
    else:
        lse = tl.load(lse_of + row)
    if GRADIENT:
        counted = tl.where(counts, tl.load(scale + row), 0.0)
        counted = tl.where(counts & (known == 0), float("nan"), counted)
        weight = 1.0 + 2.0 * z_loss * lse
        for start in range(0, cols, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(mine + at, mask=at < cols, other=0.0).to(tl.float32)
            share = tl.exp(x - lse) * weight - smoothing / cols
            share = tl.where(at == wanted, share - (1.0 - smoothing), share)
            share = tl.where(counts, share * counted, 0.0)
            tl.store(grad + row * grad_stride + at, rounded(share, grad.dtype.element_ty), mask=at < cols)


def cross_entropy(logits: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """ds::cross_entropy."""
    losses, lse = op.fake(logits, target, **settings)
    if logits.dtype == torch.float64:
        return op.reference(logits, target, **settings)
    op.check_targets("cross_entropy", target, logits.shape[1], settings["ignore_index"])
    _run(logits, None, target, None, losses, lse, settings)
    return losses, lse


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, **settings: Any
) -> Tensor:
    """ds::cross_entropy_backward."""
    grad = op.fake_backward(dlosses, logits, target, lse, **settings)
    if logits.dtype == torch.float64:
        return op.reference_backward(dlosses, logits, target, lse, **settings)
    op.check_targets("cross_entropy_backward", target, logits.shape[1], settings["ignore_index"])
    _run(logits, grad, target, dlosses, None, lse, settings)
    return grad


def cross_entropy_in_place(logits: Tensor, target: Tensor, scale: Tensor, **settings: Any) -> Tensor:
    """ds::cross_entropy_."""
    losses = op.fake_in_place(logits, target, scale, **settings)
    if logits.dtype == torch.float64:
        return op.reference_in_place(logits, target, scale, **settings)
    op.check_targets("cross_entropy_", target, logits.shape[1], settings["ignore_index"])
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    _run(rows, rows, target, scale, losses, torch.empty_like(losses), settings)
    if rows is not logits:
        logits.copy_(rows)
    return losses


def _run(
    logits: Tensor,
    grad: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor | None,
    lse: Tensor,
    settings: dict[str, Any],
) -> None:
    if logits.shape[0] == 0:
        return
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    lse = lse.contiguous()
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    cross_entropy_rows[(logits.shape[0],)](
        rows, rows if grad is None else grad, target.contiguous(),
        lse if scale is None else scale.contiguous(), lse if losses is None else losses, lse,
        logits.shape[1], rows.stride(0), 0 if grad is None else grad.stride(0), settings["ignore_index"],
        settings["label_smoothing"], settings["z_loss"], LOSSES=losses is not None,
        GRADIENT=grad is not None, BLOCK=block, num_warps=8 if block == BLOCK else 4,
    )  # fmt: skip


def _variant(dtype: str, losses: bool, gradient: bool) -> Variant:
    signature = dict.fromkeys(("logits", "grad"), f"*{dtype}")
    signature |= {"target": "*i64", **dict.fromkeys(("scale", "losses", "lse_of"), "*fp32")}
    signature |= {"cols": "i32", **dict.fromkeys(("logits_stride", "grad_stride", "ignore_index"), "i64")}
    signature |= dict.fromkeys(("smoothing", "z_loss"), "fp32")
    constants = {"LOSSES": losses, "GRADIENT": gradient, "BLOCK": BLOCK}
    return Variant(cross_entropy_rows, signature, constants, warps=8)


VARIANTS = [
    *(_variant("bf16", *which) for which in ((True, False), (False, True))),
    *(_variant(dtype, True, True) for dtype in ("fp32", "bf16", "fp16")),
]
