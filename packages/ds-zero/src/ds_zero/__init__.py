"""ZeRO stages 1, 2 and 3: shards optimizer state, gradients and parameters over data-parallel ranks."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME: dict[str, str] = {
    "clip_grad_norm_": "ds_core.train.clip",
    "compile_blocks": "ds_zero.compiled",
    "EMA": "ds_zero.ema",
    "from_pretrained": "ds_zero.load",
    "full_grad": "ds_zero.full",
    "full_optimizer_state": "ds_zero.full",
    "full_tensor": "ds_zero.full",
    "gather": "ds_zero.full",
    "inference": "ds_zero.frozen",
    "join": "ds_zero.uneven",
    "load_pretrained": "ds_zero.load",
    "materialize": "ds_zero.deferred",
    "no_sync": "ds_zero.accumulate",
    "replan": "ds_zero.changed",
    "set_full_grad": "ds_zero.full",
    "set_full_optimizer_state": "ds_zero.full",
    "set_full_tensor": "ds_zero.full",
    "shard": "ds_zero.zero",
    "TiledLinear": "ds_zero.tiled",
    "Zero": "ds_zero.zero",
    "ZeroOwner": "ds_zero.owner",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
