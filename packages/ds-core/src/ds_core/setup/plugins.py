"""Names to objects: what ds-core brings, and what other packages add through entry points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ds_core.setup.config import ConfigError, nearest

# (kind, name) -> where ds-core keeps its own; looked up when asked for, never imported here
_OWN: Mapping[tuple[str, str], str] = {
    ("codec", "cast"): "ds_core.ground.codec:CastCodec",
    ("communicator", "torch"): "ds_core.ground.collectives:TorchCommunicator",
    ("metrics", "log"): "ds_core.observe.metrics:MetricsLog",
    ("owner", "replicated"): "ds_core.state.owner:ReplicatedOwner",
    ("sink", "csv"): "ds_core.observe.metrics:CsvSink",
    ("sink", "jsonl"): "ds_core.observe.metrics:JsonlSink",
    ("sink", "tensorboard"): "ds_core.observe.metrics:TensorBoardSink",
    ("sink", "wandb"): "ds_core.observe.metrics:WandbSink",
    ("store", "device"): "ds_core.state.store:DeviceStore",
}

# package -> what it brings, so that a missing name can say what to install
_BRINGS: Mapping[str, Mapping[str, str]] = {
    "ds-zero": {"owner": "zero"},
    "ds-kernels": {"optimizer": "fused_adamw fused_adam fused_adagrad fused_sgd lion lamb muon"},
    "ds-offload": {"store": "pinned nvme tiered", "optimizer": "offload_adamw"},
    "ds-comm": {
        "codec": "int8 int4 onebit fp8",
        "route": "two_hop loco error_feedback quantized_weights delta",
        "comm_log": "wire",
        "communicator": "shm",
        "optimizer": "onebitadam zerooneadam onebitlamb",
    },
    "ds-moe": {"dispatcher": "alltoall hierarchical"},
    "ds-inference": {"generator": "llm"},
    "ds-compression": {"transform": "quantize prune layer_reduction"},
}


@cache
def _entries(kind: str) -> Mapping[str, Any]:
    """The entry points of `ds.<kind>` by name; read once per process."""
    return {entry.name: entry for entry in entry_points(group=f"ds.{kind}")}


def known(kind: str) -> list[str]:
    """The names of this kind that can be resolved here."""
    own = {name for group, name in _OWN if group == kind}
    return sorted(own | set(_entries(kind)))


@cache
def find(kind: str, name: str) -> Any | None:
    """The object registered as `name` of `kind`, or None: for things that are only nice to have."""
    if entry := _entries(kind).get(name):
        return entry.load()
    home = _OWN.get((kind, name))
    if home is None:
        return None
    module, _, attribute = home.partition(":")
    return getattr(import_module(module), attribute)


def package_for(kind: str, name: str) -> str | None:
    """The package that brings `name`, installed or not; None when nobody is known to."""
    for package, kinds in _BRINGS.items():
        if name in kinds.get(kind, "").split():
            return package
    return None


def missing(kind: str, name: str) -> LookupError:
    """The error for a name that cannot be resolved: what is known, and what to install."""
    names = known(kind)
    text = f'no {kind} "{name}"; known: {", ".join(names) or "none"}'
    if package := package_for(kind, name):
        return LookupError(f'{text}. "{name}" comes with {package} (pip install {package})')
    hints = {hint: package for package, kinds in _BRINGS.items() for hint in kinds.get(kind, "").split()}
    guess = nearest(name, [*names, *hints])
    return LookupError(f"{text}; {guess}" if guess.startswith("did") else text)


def look_up(kind: str, name: str) -> Any:
    """The class or function registered as `name` of `kind`. Raises LookupError naming the known ones."""
    found = find(kind, name)
    if found is None:
        raise missing(kind, name)
    return found


def resolve(kind: str, spec: Any) -> Any:
    """{"type": "nvme", ...} -> the class registered under entry point group `ds.<kind>`, built with the rest.

    A plain string is a spec with nothing but a type; any other object passes through unchanged.
    Raises: LookupError naming the known types and the package to install; ValueError when the other
    keys do not fit.
    """
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, Mapping):
        return spec
    options = dict(spec)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ValueError(f'a {kind} needs "type", one of {", ".join(known(kind))}; given {dict(spec)}')
    made = look_up(kind, name)
    try:
        return made(**options)
    except ConfigError as error:
        raise ConfigError(f'{kind} "{name}"', error.problems) from None
    except TypeError as error:
        raise ValueError(f'{kind} "{name}" does not take {options}: {error}') from error
