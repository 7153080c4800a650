"""Fast ops with honest references: importing this compiles nothing and touches no device.

Names are resolved on first use (PEP 562): importing the package costs next to nothing and needs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME: dict[str, str] = {
    "AdagradHyper": "ds_kernels.ops.optim.rules",
    "AdamHyper": "ds_kernels.ops.optim.rules",
    "AioError": "ds_kernels.aio.file",
    "AioFile": "ds_kernels.aio.file",
    "AioFuture": "ds_kernels.aio.job",
    "AlignedPool": "ds_kernels.aio.pool",
    "AsyncIO": "ds_kernels.aio.front",
    "Blocks": "ds_kernels.ops.quant",
    "BuildError": "ds_kernels.build",
    "FusedAdagrad": "ds_kernels.optim",
    "FusedAdam": "ds_kernels.optim",
    "FusedAdamW": "ds_kernels.optim",
    "FusedLamb": "ds_kernels.optim",
    "FusedLion": "ds_kernels.optim",
    "FusedOptimizer": "ds_kernels.fused",
    "FusedSGD": "ds_kernels.optim",
    "Kernel": "ds_kernels.registry",
    "KernelUnavailable": "ds_kernels.registry",
    "LambHyper": "ds_kernels.ops.optim.rules",
    "LayerNorm": "ds_kernels.nn",
    "LionHyper": "ds_kernels.ops.optim.rules",
    "Muon": "ds_kernels.muon",
    "PackedLinear": "ds_kernels.packed",
    "QuantLinear": "ds_kernels.linear",
    "RMSNorm": "ds_kernels.nn",
    "SgdHyper": "ds_kernels.ops.optim.rules",
    "Signs": "ds_kernels.ops.bits",
    "StepLists": "ds_kernels.ops.optim.step",
    "add_layer_norm": "ds_kernels.ops.norm",
    "add_rms_norm": "ds_kernels.ops.norm",
    "allocate_blocks": "ds_kernels.ops.quant",
    "allocate_signs": "ds_kernels.ops.bits",
    "bias_dropout_add": "ds_kernels.ops.dropout",
    "bias_gelu": "ds_kernels.ops.activation",
    "cross_entropy": "ds_kernels.ops.cross_entropy",
    "define": "ds_kernels.registry",
    "dequantize_blocks": "ds_kernels.ops.quant",
    "dequantize_linear": "ds_kernels.ops.linear",
    "geglu": "ds_kernels.ops.activation",
    "layer_norm": "ds_kernels.ops.norm",
    "linear_bf16": "ds_kernels.ops.linear",
    "linear_cross_entropy": "ds_kernels.ops.linear_cross_entropy",
    "load": "ds_kernels.registry",
    "newton_schulz": "ds_kernels.ops.muon",
    "optim_step_": "ds_kernels.ops.optim.step",
    "pack_linear": "ds_kernels.packed",
    "pack_signs_": "ds_kernels.ops.bits",
    "quant_linear": "ds_kernels.ops.linear",
    "quantize_blocks": "ds_kernels.ops.quant",
    "report": "ds_kernels.table",
    "requantize_blocks": "ds_kernels.ops.quant_reduce",
    "rms_norm": "ds_kernels.ops.norm",
    "rotary": "ds_kernels.ops.rope",
    "rotary_": "ds_kernels.ops.rope",
    "rotary_tables": "ds_kernels.ops.rope",
    "softmax": "ds_kernels.ops.softmax",
    "sum_blocks": "ds_kernels.ops.quant_reduce",
    "sum_into_": "ds_kernels.ops.sums",
    "swiglu": "ds_kernels.ops.activation",
    "undo_step_": "ds_kernels.ops.optim.step",
    "unpack_signs": "ds_kernels.ops.bits",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
