"""A linear layer whose weight is frozen in 8, 6 or 4 bits: what decoding, and LoRA over it, need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ds_kernels.ops.linear import OPS, dequantize_linear
from ds_kernels.packed import (
    DEFAULT_GROUP,
    Bits,
    PackedLinear,
    check_group,
    code_shape,
    groups_of,
    pack_linear,
)
from ds_kernels.registry import load


class QuantLinear(nn.Module):
    """torch.nn.Linear with a packed weight: codes, scales and zero points are buffers, the bias frozen too.

    Gradients reach the input, and the bias if it is asked for. `to(dtype)` converts the bias only: scales
    stay fp32. A checkpoint is its plain state_dict; construct with the same settings and load it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: Bits = 8,
        group: int | None = None,
        symmetric: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in DEFAULT_GROUP:
            raise ValueError(f"QuantLinear: bits={bits} is not allowed: it must be 8, 6 or 4")
        if not symmetric and bits != 4:
            raise ValueError(f"QuantLinear: symmetric=False is for 4 bits, not {bits}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group = DEFAULT_GROUP[bits] if group is None else group
        check_group("QuantLinear", self.group)
        kind, length = code_shape(bits, in_features)
        shape = (out_features, groups_of(in_features, self.group))
        self.register_buffer("codes", torch.zeros(out_features, length, dtype=kind, device=device))
        self.register_buffer("scales", torch.ones(shape, device=device, dtype=torch.float32))
        zeros = None if symmetric else torch.zeros(shape, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        kept = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", kept if bias else None)
        if self.codes.device.type != "meta":
            load("linear", self.codes.device)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: Bits = 8, group: int | None = None, symmetric: bool = True
    ) -> QuantLinear:
        """Pack a layer's weight (see pack_linear) and copy its bias."""
        weight, bias = linear.weight.detach(), linear.bias
        made = cls(
            linear.in_features, linear.out_features, bits, group, symmetric,
            bias=bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        packed = pack_linear(weight, bits, group=made.group, symmetric=symmetric)
        made.codes, made.scales, made.zeros = packed.codes, packed.scales, packed.zeros
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return made

    @property
    def packed(self) -> PackedLinear:
        """The weight as quant_linear takes it."""
        return PackedLinear(self.bits, self.in_features, self.group, self.codes, self.scales, self.zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] in floats."""
        return dequantize_linear(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        out: Tensor = OPS[self.bits](
            x, self.codes, self.scales, self.zeros, self.bias, self.group, self.in_features
        )
        return out

    def extra_repr(self) -> str:
        """What print shows."""
        kind = "" if self.zeros is None else ", symmetric=False"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group={self.group}{kind}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        scales = self.scales

        def but_for_scales(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return scales.to(moved.device) if tensor is scales and moved.dtype != scales.dtype else moved

        super()._apply(but_for_scales, recurse)  # type: ignore[no-untyped-call]
        if self.codes.device.type not in ("meta", scales.device.type):
            load("linear", self.codes.device)
        return self
