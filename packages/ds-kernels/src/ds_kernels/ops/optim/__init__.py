"""Optimizer steps over lists of tensors: the element-wise rules, and LAMB, which needs whole-tensor norms."""

from ds_kernels.ops.optim import step

__all__ = ["step"]
