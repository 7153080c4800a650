"""What every codec must keep, whoever wrote it: call `check_codec` with a function that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ds_core.ground.wire import Codec

SIZES = (0, 1, 2, 7, 8, 63, 64, 65, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BoundedCodec(Codec, Protocol):
    """A codec that says how far off its values may be."""

    def error_bound(self, src: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., n] fp64: how far each decoded value may be from `src`; `dtype`: what it is decoded into."""
        ...


def check_codec(make: Callable[[], BoundedCodec], *, exact: Callable[[Tensor], Tensor] | None = None) -> None:
    """Bound, bytes, exactness, adding up, the same bits twice, views at any place, state, non-finite values.

    `exact` turns random values [chunks, n] into such as the codec keeps to the bit (zeros it must, all of
    them). Raises: AssertionError naming the case.
    """
    for dtype in DTYPES:
        for chunks in (1, 2, 3, 4):
            for numel in SIZES:
                _check_case(make, dtype, chunks, numel, exact)
    _check_lossy(make)
    _check_state(make)
    _check_not_finite(make)


def _values(dtype: torch.dtype, chunks: int, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * chunks + numel)
    values = torch.randn(chunks, numel, generator=generator)
    return (values * 2.0 ** torch.arange(-chunks, 0).view(-1, 1)).to(dtype)


def _check_case(
    make: Callable[[], BoundedCodec],
    dtype: torch.dtype,
    chunks: int,
    numel: int,
    exact: Callable[[Tensor], Tensor] | None,
) -> None:
    case = f"{make()!r}, {dtype}, {chunks} x {numel}"
    src = _values(dtype, chunks, numel)
    codec = make()
    width = codec.wire_bytes(numel)
    assert isinstance(width, int) and (width > 0) == (numel > 0), f"{case}: {width} bytes"  # noqa: PT018
    wire = torch.full((chunks, width), 0xAB, dtype=torch.uint8)
    codec.encode(src, wire)
    for out_dtype in DTYPES:
        out = torch.full((chunks, numel), torch.nan, dtype=out_dtype)
        codec.decode(wire, out)
        bound = codec.error_bound(src, out_dtype)
        assert bound.shape == src.shape, f"{case}: a bound of shape {tuple(bound.shape)}"
        gap = (out.double() - src.double()).abs()
        assert bool((gap <= bound).all()), f"{case} into {out_dtype}: off by {gap.max()}, bound {bound.max()}"
        before = _values(out_dtype, chunks, numel).flip(-1)
        more = before.clone()
        codec.decode(wire, more, accumulate=True)
        wide = torch.empty(chunks, numel)
        codec.decode(wire, wide)
        assert torch.equal(more, (before.float() + wide).to(out_dtype)), f"{case}: adding to {out_dtype}"
    again = torch.full_like(wire, 0xCD)
    make().encode(src, again)
    assert torch.equal(wire, again), f"{case}: other bytes the second time"
    for name, odd_src, odd_wire, odd_out in _views(src, width):
        make().encode(odd_src, odd_wire)
        assert torch.equal(odd_wire, wire), f"{case}: other bytes {name}"
        codec.decode(odd_wire, odd_out)
        plain = torch.empty_like(src)
        codec.decode(wire, plain)
        assert torch.equal(odd_out, plain), f"{case}: other values {name}"
    _check_exact(make, src * 0, case)
    if exact is not None:
        _check_exact(make, exact(src), case)


def _views(src: Tensor, width: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """The same source, and wires and outputs, that begin at any byte or are strided rows."""
    chunks, numel = src.shape
    for shift in (1, 2, 3):
        wire = torch.zeros(chunks * width + shift, dtype=torch.uint8)[shift:].view(chunks, width)
        values = torch.zeros(chunks * numel + shift, dtype=src.dtype)[shift:].view(chunks, numel).copy_(src)
        yield f"at byte {shift}", values, wire, torch.zeros_like(values)
    wire = torch.zeros(chunks, width + 5, dtype=torch.uint8)[:, 3 : 3 + width]
    rows = torch.zeros(chunks, 2, numel, dtype=src.dtype)[:, 1].copy_(src)
    yield "in strided rows", rows, wire, torch.zeros(chunks, 2, numel, dtype=src.dtype)[:, 0]


def _check_exact(make: Callable[[], BoundedCodec], src: Tensor, case: str) -> None:
    codec = make()
    wire = torch.empty(len(src), codec.wire_bytes(src.shape[1]), dtype=torch.uint8)
    codec.encode(src, wire)
    out = torch.full_like(src, torch.nan)
    codec.decode(wire, out)
    assert torch.equal(out, src), f"{case}: values that it can hold came back as others"


def _check_lossy(make: Callable[[], BoundedCodec]) -> None:
    """A bound above zero is used: otherwise nothing was coded, and every test of a bound passes."""
    codec, src = make(), _values(torch.float32, 1, 1000)
    wire, out = torch.empty(1, codec.wire_bytes(1000), dtype=torch.uint8), torch.empty_like(src)
    codec.encode(src, wire)
    codec.decode(wire, out)
    bound, gap = codec.error_bound(src), (out - src).double().abs()
    if bool((bound > 0).any()):
        assert bool((gap > bound / 100).any()), f"{codec!r}: nothing is lost, and its bound says otherwise"


def _check_state(make: Callable[[], BoundedCodec]) -> None:
    """A codec that takes over another's state goes on as that one does."""
    one, other, src = make(), make(), _values(torch.float32, 2, 65)
    wires = [torch.zeros(2, one.wire_bytes(65), dtype=torch.uint8) for _ in range(2)]
    for _ in range(3):
        one.encode(src, wires[0])
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict(), f"{one!r}: the state changed on its way"
    one.encode(src, wires[0])
    other.encode(src, wires[1])
    assert torch.equal(*wires), f"{one!r}: goes on otherwise after its state was loaded"
    try:
        other.load_state_dict({"no such entry": 1})
    except ValueError:
        return
    raise AssertionError(f"{one!r} takes a state that is not its own")


def _check_not_finite(make: Callable[[], BoundedCodec]) -> None:
    """Every chunk either refuses to be decoded, or the value's place shows that it was not finite."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        codec, src = make(), _values(torch.float32, 2, 65)
        src[1, 40] = bad
        wire = torch.empty(2, codec.wire_bytes(65), dtype=torch.uint8)
        codec.encode(src, wire)
        for row in (0, 1):
            out = torch.zeros(1, 65)
            try:
                codec.decode(wire[row : row + 1], out)
            except ValueError:
                continue
            shown = row == 0 or not bool(torch.isfinite(out[0, 40]))
            assert shown, f"{codec!r}: {bad} came back as {float(out[0, 40])}"
