"""The shared vocabulary of the suite, the training step, and the plain version of everything.

Names are resolved on first use (PEP 562), so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME: dict[str, str] = {
    "Accelerator": "ds_core.ground.accelerator",
    "CastCodec": "ds_core.ground.codec",
    "DeviceStore": "ds_core.state.store",
    "DynamicScale": "ds_core.train.scale",
    "Engine": "ds_core.train.engine",
    "FlatOwner": "ds_core.state.owner",
    "Mesh": "ds_core.ground.mesh",
    "NonFiniteError": "ds_core.train.nonfinite",
    "PartitionedInputs": "ds_core.train.recompute",
    "ReplicatedOwner": "ds_core.state.owner",
    "ShardedOptimizer": "ds_core.train.optim",
    "StaticScale": "ds_core.train.scale",
    "StepReport": "ds_core.train.engine",
    "Ticket": "ds_core.ground.ticket",
    "Topology": "ds_core.ground.mesh",
    "TorchCommunicator": "ds_core.ground.collectives",
    "checkpoint_blocks": "ds_core.train.recompute",
    "clip_grad_norm_": "ds_core.train.clip",
    "init_distributed": "ds_core.ground.mesh",
    "leave_distributed": "ds_core.ground.mesh",
    "CheckpointStore": "ds_core.state.checkpoint",
    "SaveHandle": "ds_core.state.checkpoint_job",
    "RngState": "ds_core.train.rng",
    "export_hf": "ds_core.state.export",
    "ResumableLoader": "ds_core.train.sampler",
    "ResumableSampler": "ds_core.train.sampler",
    "build_schedule": "ds_core.train.schedule",
    "initialize": "ds_core.setup.compat",
    "Config": "ds_core.setup.config",
    "ConfigError": "ds_core.setup.config",
    "CsvSink": "ds_core.observe.metrics",
    "JsonlSink": "ds_core.observe.metrics",
    "JointOptimizer": "ds_core.train.joint",
    "MetricsLog": "ds_core.observe.metrics",
    "TensorBoardSink": "ds_core.observe.metrics",
    "WandbSink": "ds_core.observe.metrics",
    "FlopsProfiler": "ds_core.observe.flops",
    "Timeline": "ds_core.observe.timeline",
    "trace": "ds_core.observe.trace",
    "profile_model": "ds_core.observe.flops",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
