"""What Triton kernels of several families share: rounding to a dtype."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """fp32 rounded to nearest even; to bf16 by hand, because the interpreter's own conversion cuts off."""
    if tl.bfloat16 == KIND:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return tl.where(x != x, quiet, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(KIND)
