"""Rotary position embedding: pairs of elements turned by an angle that grows with the position."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES, Native, code, written
from ds_kernels.registry import Kernel, define, ready

FAMILY, NAME, NAME_IN_PLACE = "rope", "rope", "rope_"
MOST = 1024  # elements of a head that the library takes; the reference takes more
_SCHEMA = "Tensor cos, Tensor sin, Tensor positions, *, bool interleaved, bool inverse"


def rotary_tables(
    positions: int, dim: int, *, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2 i / dim), computed in float64, kept in fp32.

    Shapes: -> [positions, dim / 2] each.
    """
    check.number("rotary_tables", "dim", dim, "even and > 0", dim > 0 and dim % 2 == 0)
    check.number("rotary_tables", "positions", positions, ">= 0", positions >= 0)
    rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> Tensor:
    """x with the first 2 R elements of each head turned by their token's angles (Su et al. 2021, eq. 34).

    Pairs are (i, i + R), as in Llama and GPT-NeoX, or with `interleaved` (2 i, 2 i + 1), as in GPT-J. The
    rest of a head is copied. For x as [..., heads, tokens, D] give `x.transpose(-3, -2)`: strides are
    followed. Angles are read at `positions`, by default 0, 1, ... of each sequence.
    Shapes: x [..., T, heads, D] fp32, bf16, fp16 (float64: reference only), cos and sin [P, R] fp32,
    positions [T] or [..., T] int64 -> like x.
    Raises: ValueError, also for a position outside [0, P) on the CPU; on a GPU what it turns is NaN.
    """
    ready(FAMILY, x.device)
    made: Tensor = OP(x, cos, sin, _positions(x, positions), interleaved=interleaved, inverse=False)
    return made


def rotary_(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> Tensor:
    """`rotary` in x's own memory; returns x."""
    ready(FAMILY, x.device)
    made: Tensor = _InPlace.apply(x, cos, sin, _positions(x, positions), interleaved)  # type: ignore[no-untyped-call]
    return made


def _positions(x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None and x.dim() >= 3:
        return torch.arange(x.shape[-3], device=x.device)
    return x if positions is None else positions  # x is refused, as having too few dimensions


class _InPlace(torch.autograd.Function):
    """The gradient needs nothing of x, so x may be overwritten."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
    ) -> Tensor:
        IN_PLACE(x, cos, sin, positions, interleaved=interleaved, inverse=False)
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        made: Tensor = OP(dy, *ctx.saved_tensors, interleaved=ctx.interleaved, inverse=True)
        return made, None, None, None, None


# -- references --------------------------------------------------------------------------------------------


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
) -> Tensor:
    """The op out of place: every product rounded on its own, then one rounding to x's dtype."""
    out = fake(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
    check_positions(NAME, positions, cos)
    return out.copy_(_turned(x, cos, sin, positions, interleaved, inverse))


def reference_in_place(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
) -> None:
    """The op in place."""
    fake_in_place(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
    check_positions(NAME_IN_PLACE, positions, cos)
    x.copy_(_turned(x, cos, sin, positions, interleaved, inverse))


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, inverse: bool
) -> Tensor:
    known, pairs = cos.shape
    v = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    c, s = (table[positions.clamp(0, max(known - 1, 0))][..., None, :].to(v.dtype) for table in (cos, sin))
    outside = ((positions < 0) | (positions >= known))[..., None, None]
    c, s = c.masked_fill(outside, torch.nan), -s if inverse else s
    if interleaved:
        a, b = v[..., 0 : 2 * pairs : 2], v[..., 1 : 2 * pairs : 2]
    else:
        a, b = v[..., :pairs], v[..., pairs : 2 * pairs]
    turned = [a * c - b * s, b * c + a * s]
    front = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([front, v[..., 2 * pairs :]], -1).to(x.dtype)


# -- what fits ---------------------------------------------------------------------------------------------


def check_positions(op: str, positions: Tensor, cos: Tensor) -> None:
    """Raise ValueError for a position that the tables lack; only on the CPU, where looking does not wait."""
    if positions.device.type == "cpu" and positions.numel():
        low, high = (int(t) for t in positions.aminmax())
        fits = low >= 0 and high < len(cos)
        check.number(op, "positions", low if low < 0 else high, f"in [0, {len(cos)}), as cos has rows", fits)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    check.tensor(op, "x", x, dtypes=(*DTYPES, torch.float64), dims=3)
    check.tensor(op, "cos", cos, dtypes=[torch.float32], device=x.device, shape=(None, None))
    check.tensor(op, "sin", sin, dtypes=[torch.float32], device=x.device, shape=cos.shape)
    if 2 * cos.shape[1] > x.shape[-1]:
        check.refuse(
            op, "cos", cos, f"at most {x.shape[-1] // 2} columns, one for each pair of x's last dimension"
        )
    shape = x.shape[-3:-2] if positions.dim() == 1 else x.shape[:-2]
    check.tensor(op, "positions", positions, dtypes=[torch.int64], device=x.device, shape=shape)


def fake(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
) -> Tensor:
    """Checks, and what is returned: with x's strides, where they leave no gaps."""
    _check(NAME, x, cos, sin, positions)
    return torch.empty_like(x)


def fake_in_place(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
) -> None:
    """Checks."""
    _check(NAME_IN_PLACE, x, cos, sin, positions)
    if type(x) is Tensor and x.device.type != "meta":
        given: dict[str, Tensor | None] = {"x": x, "cos": cos, "sin": sin, "positions": positions}
        check.apart(NAME_IN_PLACE, given, read=("cos", "sin", "positions"))


# -- gradient ----------------------------------------------------------------------------------------------


def _saves(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.how = keyword_only_inputs


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    """A rotation is undone by the opposite one, which is its transpose."""
    how = {**ctx.how, "inverse": not ctx.how["inverse"]}
    return OP(dy, *ctx.saved_tensors, **how), None, None, None


# -- native ------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """DsRopeCall of sources/rope/rope_cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "cos", "sin", "positions")),
        *((name, ctypes.c_int64) for name in ("batches", "tokens", "heads", "width", "pairs")),
        *((name, ctypes.c_int64 * 3) for name in ("x_strides", "out_strides")),
        *((name, ctypes.c_int32) for name in ("interleaved", "inverse", "dtype", "isa", "threads")),
    )


def four_dims(x: Tensor) -> Tensor | None:
    """A view as [batches, T, heads, D] with elements of a head beside each other; None if it takes a copy."""
    if x.dim() > 4:
        try:
            x = x.view(-1, *x.shape[-3:])
        except RuntimeError:
            return None
    x = x[None] if x.dim() == 3 else x
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else None


def each_position(x: Tensor, positions: Tensor) -> Tensor:
    """[batches, T] of them."""
    return positions.expand(x.shape[:-2]).reshape(-1, x.shape[-3]).contiguous()


Loop = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool], None]


def out_of_place(loop: Loop) -> Callable[..., Tensor]:
    """The op around a loop over [batches, T, heads, D]."""

    def run(
        x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
    ) -> Tensor:
        out = fake(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        if x.dtype == torch.float64 or x.shape[-1] > MOST:
            return reference(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        check_positions(NAME, positions, cos)
        if x.numel() == 0:
            return out
        given, made = four_dims(x), four_dims(out)
        if given is None or made is None:
            return reference(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        loop(given, made, cos, sin, each_position(x, positions), interleaved, inverse)
        return out

    return run


def in_place(loop: Loop) -> Callable[..., None]:
    """The op that overwrites x around a loop over [batches, T, heads, D]."""

    def run(
        x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, inverse: bool
    ) -> None:
        fake_in_place(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        check_positions(NAME_IN_PLACE, positions, cos)
        if x.numel() == 0:
            return None
        given = four_dims(x)
        if x.dtype == torch.float64 or x.shape[-1] > MOST or given is None:
            return reference_in_place(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        loop(given, given, cos, sin, each_position(x, positions), interleaved, inverse)

    return run


def make_loop(library: Native) -> Loop:
    """The loop of the family's library."""
    call = library.function("ds_rope", ctypes.POINTER(_Call))

    def loop(
        x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, inverse: bool
    ) -> None:
        tables = cos.contiguous(), sin.contiguous()
        strides = [(ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (x, out)]
        codes = (interleaved, inverse, code(x.dtype), library.isa_code, torch.get_num_threads())
        at = [t.data_ptr() for t in (x, out, *tables, positions)]
        call(_Call(*at, *x.shape, cos.shape[1], *strides, *codes))
        if out is x:
            written([x])

    return loop


OP = define(
    Kernel(
        name=NAME,
        schema=f"(Tensor x, {_SCHEMA}) -> Tensor",
        family=FAMILY,
        reference=reference,
        fake=fake,
        native=lambda library: out_of_place(make_loop(library)),
        triton=lambda module: out_of_place(module.loop),
        backward=_gradient,
        saves=_saves,
    )
)
IN_PLACE = define(
    Kernel(
        name=NAME_IN_PLACE,
        schema=f"(Tensor(a!) x, {_SCHEMA}) -> ()",
        family=FAMILY,
        reference=reference_in_place,
        fake=fake_in_place,
        native=lambda library: in_place(make_loop(library)),
        triton=lambda module: in_place(module.loop),
    )
)
