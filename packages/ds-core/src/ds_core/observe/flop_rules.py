"""What one operator call costs: multiply-accumulates by formula, and element-wise work by one rule (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Formula = Callable[..., int]  # (*args, out, **kwargs) of the operator -> FLOPs, two per multiply-accumulate


def _matrix_vector(matrix: Tensor, vector: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(bias: Tensor, matrix: Tensor, vector: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _dot(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _integer_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped_product(a: Tensor, b: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    """Groups cut the rows, the columns or (both 2-D) the summed dimension, which then counts once in all."""
    groups = out.shape[0] if a.dim() == b.dim() == 2 else 1
    return 2 * out.numel() // groups * a.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, *options: Any, **__: Any
) -> int:
    """Each of the two gradients takes as many products as the forward; torch's own formula ignores groups."""
    transposed, mask = options[3], options[6]
    positions = prod((x if transposed else grad).shape[2:])
    return 2 * grad.shape[0] * positions * weight.numel() * (bool(mask[0]) + bool(mask[1]))


def _mkldnn_rnn(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() // x.shape[-1] * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.dim() > 1)


def _twice(formula: Formula) -> Formula:
    return lambda *args, **kwargs: 2 * formula(*args, **kwargs)


_OWN: Mapping[str, Formula] = {
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "dot": _dot,
    "vdot": _dot,
    "_int_mm": _integer_product,
    "_grouped_mm": _grouped_product,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "convolution_backward": _convolution_backward,
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "mkldnn_rnn_layer_backward": _twice(_mkldnn_rnn),
    "_cudnn_rnn": _cudnn_rnn,
    "_cudnn_rnn_backward": _twice(_cudnn_rnn),
}

# Where an added bias is an argument of the product; its place among the arguments.
_BIAS: Mapping[str, int] = {"addmm": 0, "baddbmm": 0, "addmv": 0, "convolution": 2, "_convolution": 2}

# torch tags these as pointwise; they move or choose values and compute none.
_MOVES = frozenset({"clone", "where", "masked_fill", "fill", "copysign", "lift_fresh", "alias"})

# Not tagged: what reads every element of its input once and computes on it.
_READS_ALL = """
    sum mean prod amax amin max min var var_mean std std_mean norm linalg_vector_norm logsumexp cumsum cumprod
    _softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward _native_batch_norm_legit cudnn_batch_norm
    cudnn_batch_norm_backward batch_norm_backward _batch_norm_with_update _fused_rms_norm
    _fused_rms_norm_backward avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
    max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices
    max_pool3d_with_indices_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
    _adaptive_avg_pool3d_backward adaptive_max_pool2d adaptive_max_pool2d_backward mse_loss mse_loss_backward
    smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
    binary_cross_entropy_backward glu glu_backward native_dropout native_dropout_backward
"""
_PER_ELEMENT = frozenset(_READS_ALL.split())


def packet_of(func: Any) -> Any:
    """The operator without its overload; a higher-order operator is its own."""
    return getattr(func, "_overloadpacket", func)


@cache
def name_of(func: Any) -> str:
    """`aten.addmm.out` -> "addmm"; other namespaces keep theirs: "ds.adam"."""
    packet = packet_of(func)
    space, name = getattr(func, "namespace", ""), getattr(packet, "__name__", str(packet))
    return name if space in ("aten", "") else f"{space}.{name}"


@cache
def _formula(func: Any) -> Formula | None:
    own = _OWN.get(name_of(func))
    if own is not None:
        return own
    counted = flop_registry.get(packet_of(func))
    if counted is None:
        return None
    return lambda *args, out, **kwargs: int(counted(*args, out_val=out, **kwargs))


def has_formula(func: Any) -> bool:
    """Is this operator counted as it is, not by what it is made of?"""
    return _formula(func) is not None


def flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Two per multiply-accumulate of a matrix product, convolution, attention or recurrent layer; else 0.

    Attention counts the whole score matrix, causal or not, and its backward the second product of the scores.
    Operators that `torch.utils.flop_counter.register_flop_formula` was told about are counted by that.
    """
    formula = _formula(func)
    return 0 if formula is None else formula(*args, out=out, **kwargs)


@cache
def _elementwise(func: Any) -> bool | None:
    """True: per element written; False: per element of the largest tensor; None: not at all."""
    name = name_of(func).removesuffix("_")
    if name in _PER_ELEMENT:
        return False
    tagged = torch.Tag.pointwise in getattr(func, "tags", ())
    return True if tagged and name not in _MOVES else None


def elementwise(func: Any, args: Sequence[Any], out: Any) -> int:
    """One for each floating-point element, in what computes element by element, normalises, pools or reduces.

    A bias inside a product adds one for each element of the output. What moves, compares, looks up or draws
    values costs nothing.
    """
    name = name_of(func)
    if name in _BIAS:
        at = _BIAS[name]
        return _numel(out) if len(args) > at and args[at] is not None else 0
    if name == "convolution_backward":
        return int(args[0].numel()) if args[10][2] else 0
    kind = _elementwise(func)
    if kind is None:
        return 0
    written = _numel(out)
    return written if kind else max(written, max((_numel(arg) for arg in args), default=0))


def _numel(value: Any) -> int:
    """Elements of the largest floating-point tensor."""
    if isinstance(value, Tensor):
        return value.numel() if value.is_floating_point() or value.is_complex() else 0
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return max((_numel(item) for item in value), default=0)
    return 0
