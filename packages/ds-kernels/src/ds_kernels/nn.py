"""RMSNorm and LayerNorm as modules: torch's parameters and names, and a residual added in the same pass."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from ds_kernels.ops import norm
from ds_kernels.registry import load


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight; state dicts are those of torch.nn.RMSNorm.

    Called with a residual it returns (norm(x + residual), x + residual).
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        load(norm.FAMILY, self.weight.device)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual."""
        if residual is None:
            return norm.rms_norm(x, self.weight, eps=self.eps)
        return norm.add_rms_norm(x, residual, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"{len(self.weight)}, eps={self.eps}"


class LayerNorm(nn.Module):
    """`layer_norm` with a learned weight and bias; state dicts are those of torch.nn.LayerNorm.

    Called with a residual it returns (norm(x + residual), x + residual).
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        zeros = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", zeros)
        load(norm.FAMILY, self.weight.device)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual."""
        if residual is None:
            return norm.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return norm.add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"{len(self.weight)}, eps={self.eps}"
