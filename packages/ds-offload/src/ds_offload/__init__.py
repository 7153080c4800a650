"""Keeps bytes somewhere cheaper and brings them back in time."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME: dict[str, str] = {
    "ActivationOffload": "ds_offload.activation",
    "Bandwidths": "ds_offload.measure",
    "Tiered": "ds_offload.policy",
    "TieredStore": "ds_offload.store",
    "Volume": "ds_offload.volume",
    "bind_here": "ds_offload.binding",
    "io_settings": "ds_offload.io_bench",
    "measure_bandwidths": "ds_offload.measure",
    "plan_tiers": "ds_offload.balance",
    "Room": "ds_offload.balance",
    "offload_activations": "ds_offload.activation",
    "offload_blocks": "ds_offload.activation",
    "plan_binding": "ds_offload.binding",
    "predict_step": "ds_offload.measure",
    "predict_update": "ds_offload.measure",
    "park": "ds_offload.parking",
    "unpark": "ds_offload.parking",
    "ZenFlow": "ds_offload.zenflow",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
