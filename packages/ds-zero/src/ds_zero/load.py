"""Weights of a Hugging Face directory into a model, each rank reading its own part of every tensor."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.state.owner import FlatOwner, owner_of
from ds_core.state.unit import FlatUnit
from ds_zero.deferred import leave_to_module, meta_twin, set_source
from ds_zero.load_files import open_directory
from ds_zero.load_sources import Source, read_whole
from ds_zero.load_tensor import FileTensor

# Arguments of transformers' from_pretrained that would undo, or be undone by, what is done here.
_REFUSED = {
    "device_map": "the mesh that the model is sharded over says where parameters live",
    "max_memory": "parameters are sharded, not placed",
    "tp_plan": "parameters are sharded by `shard`",
    "tp_size": "parameters are sharded by `shard`",
    "distributed_config": "parameters are sharded by `shard`",
    "offload_folder": "nothing is offloaded while loading",
    "quantization_config": "quantised loading needs whole tensors: load with transformers, then shard",
    "gguf_file": "only safetensors are read in parts",
    "state_dict": "the values come from the directory",
    "output_loading_info": "missing and unexpected names are reported as transformers does",
    "use_safetensors": "only safetensors are read in parts",
    "variant": "give the directory with model.safetensors in it",
    "subfolder": "give the directory with model.safetensors in it",
    "revision": "give a directory: nothing is downloaded",
}
_SHOWN = 8  # names in a message


@dataclass(frozen=True, slots=True)
class Loaded:
    """What did not fit: the names that the files lack, and those that the model lacks."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def from_pretrained(model_class: Any, directory: str | os.PathLike[str], **options: Any) -> Any:
    """transformers' `model_class.from_pretrained(directory, **options)`, without reading a weight.

    `model_class` is a model or an Auto class. Parameters are on the meta device; `shard` or `Zero.shard`
    fills them: each rank reads its own part of each tensor, so that all ranks together read the files once
    and none holds more than its shards. transformers itself decides on names, conversions (packed experts,
    old names), ties, dtypes and what to do with missing weights, which it initialises, and reports.
    Leave `dtype` alone and give one to `shard`: masters then come from the files, unrounded.
    The model is in evaluation mode, as there: call `model.train()`.
    Raises: FileNotFoundError, DamagedCheckpoint, ValueError listing all tensors of another shape.
    """
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"from_pretrained cannot take {name}={options[name]!r}: {reason}")
    stored = open_directory(directory)
    config = options.pop("config", None)
    if config is None:
        config, options = _read_config(model_class, directory, options)
    model, _ = _load_lazily(model_class, config, stored, **options)
    model.config.name_or_path = model.name_or_path = str(directory)
    if (Path(directory) / "generation_config.json").exists() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)
    _to_meta(model)
    return model


def load_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> Loaded:
    """Weights of a directory into a model that is there: sharded, on the meta device, or an ordinary one.

    A sharded model's masters are written now, each rank reading its own part; parameters on the meta device
    are filled when the model is sharded. For a transformers model names and conversions are transformers'
    business, as in `from_pretrained`; for any other, names must be the same. What the files lack keeps its
    values (or is initialised at sharding) and is named in a warning, as are names that the model lacks.
    Collective for a sharded model.
    Raises: FileNotFoundError, DamagedCheckpoint, ValueError listing all tensors of another shape, LookupError
    when no name fits: all of them before anything is changed.
    """
    stored: Mapping[str, Source] = open_directory(directory)
    named = _named(model)
    loaded: Loaded | None = None
    if _is_transformers(model):
        skeleton, info = _load_lazily(type(model), copy.deepcopy(model.config), stored)
        stored = {name: t.source for name, t in _named(skeleton).items() if isinstance(t, FileTensor)}
        if _named(skeleton).keys() == named.keys():
            loaded = Loaded(tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])))
    sources = {name: source for name, source in stored.items() if name in named}
    if loaded is None:  # not transformers' business, or its model was changed since
        loaded = _compare(named, sources, stored, directory)
    _refuse_shapes((name, source.shape, tuple(named[name].shape)) for name, source in sources.items())
    _write(model, named, sources)
    return loaded


def _read_config(model_class: Any, directory: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The directory's config; options that are none of its attributes come back for the model."""
    from transformers import AutoConfig

    kept = {key: options.pop(key) for key in ("dtype", "key_mapping", "generation_config") if key in options}
    config_class = getattr(model_class, "config_class", None) or AutoConfig
    config, rest = config_class.from_pretrained(directory, return_unused_kwargs=True, **options)
    return config, {**rest, **kept}


def _load_lazily(
    model_class: Any, config: Any, stored: Mapping[str, Source], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """transformers' own loading, given tensors that are still in their files.

    Raises ValueError listing all tensors of another shape, unless `ignore_mismatched_sizes`.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"these files are quantised, and {_REFUSED['quantization_config']}")
    if getattr(model_class, "base_model_prefix", None) is None:  # an Auto class
        with torch.device("meta"):
            model_class = type(model_class.from_config(copy.deepcopy(config)))
    ignore = bool(options.pop("ignore_mismatched_sizes", False))
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: FileTensor(source) for name, source in stored.items()},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    if not ignore:
        _refuse_shapes(info["mismatched_keys"])
    return model, info


def _refuse_shapes(pairs: Iterable[tuple[str, Any, Any]]) -> None:
    wrong = [
        f"{name} is {list(theirs)} in the file and {list(ours)} in the model"
        for name, theirs, ours in sorted(pairs)
        if tuple(theirs) != tuple(ours)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors have another shape: {'; '.join(wrong)}. Nothing was loaded: "
            "build the model with the config of these files"
        )


def _compare(
    named: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    stored: Mapping[str, Source],
    directory: object,
) -> Loaded:
    """Which names do not fit, said in a warning. A tied parameter needs one of its names only."""
    had = {id(named[name]) for name in sources}
    missing = tuple(name for name, tensor in named.items() if id(tensor) not in had)
    unexpected = tuple(name for name in stored if name not in sources)
    if named and not sources:
        raise LookupError(
            f"no tensor of {directory} has a name of the model: it holds {_listing(unexpected)}, the model "
            f"wants {_listing(missing)}"
        )
    if missing:
        warnings.warn(
            f"{directory} lacks {len(missing)} tensors of the model, which keep the values they have or get "
            f"from their modules: {_listing(missing)}",
            stacklevel=3,
        )
    if unexpected:
        warnings.warn(
            f"{directory} has {len(unexpected)} tensors that are not in the model: {_listing(unexpected)}",
            stacklevel=3,
        )
    return Loaded(missing, unexpected)


def _listing(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under every name they have, and the buffers that belong into files."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found[f"{prefix}.{key}" if prefix else key] = buffer
    return found


def _to_meta(model: nn.Module) -> None:
    """Parameters that are still in their files become meta parameters with that source; buffers are read."""
    twins: dict[int, tuple[FileTensor, nn.Parameter]] = {}
    for module in model.modules():
        for key, param in list(module._parameters.items()):
            if not isinstance(param, FileTensor):
                continue
            if id(param) not in twins:
                twin = meta_twin(param)
                set_source(twin, param.source)
                twins[id(param)] = (param, twin)
            setattr(module, key, twins[id(param)][1])
        for key, buffer in list(module._buffers.items()):
            if isinstance(buffer, FileTensor):
                module._buffers[key] = read_whole(buffer.source, buffer.dtype)


def _write(model: nn.Module, named: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    """Each tensor once, where it lives."""
    done = set[int]()
    owned: dict[FlatOwner, dict[int, list[tuple[int, Source]]]] = {}
    for name, source in sources.items():
        tensor = named[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        owner = _owner(tensor)
        if owner is not None:
            unit, index = owner.place(tensor)
            owned.setdefault(owner, {}).setdefault(owner.units.index(unit), []).append((index, source))
        elif isinstance(tensor, nn.Parameter) and tensor.is_meta:
            set_source(tensor, source)
        elif tensor.is_meta:
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, read_whole(source, tensor.dtype))
        else:
            with torch.no_grad():
                tensor.copy_(read_whole(source, tensor.dtype))
    for param in model.parameters():
        if param.is_meta:
            leave_to_module(param, "and the files that were loaded lack it")
    for owner, units in owned.items():
        _write_shards(owner, {owner.units[number]: parts for number, parts in sorted(units.items())})


def _owner(tensor: Tensor) -> FlatOwner | None:
    try:
        return owner_of(tensor)
    except LookupError:
        return None


def _write_shards(owner: FlatOwner, units: Mapping[FlatUnit, list[tuple[int, Source]]]) -> None:
    """Parts of units from their sources; what else a unit holds stays. Collective."""
    owner.changes.open()
    owner.settle()
    owner.zero_grad()
    for unit, parts in units.items():
        values = unit.values().detach()
        if not unit.trainable:  # a store may keep frozen values in a form that is written as a whole
            values = values.clone()
        for index, source in parts:
            overlap = unit.layout.overlap(unit.rank, index)
            if overlap is not None:
                source.read(overlap.begin, values[slice(*overlap.local)])
        if not unit.trainable:
            unit.local.copy_(values)
        unit.refresh_local()
        torch.autograd.graph.increment_version(unit.params)
        owner.publish_unit(unit)
        owner.settle()
        unit.note_versions()
