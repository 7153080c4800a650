"""Export: the model of a checkpoint as a directory that Hugging Face's from_pretrained loads."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_core.state.checkpoint_commit import put_file, sync_directory
from ds_core.state.checkpoint_digest import check_file
from ds_core.state.checkpoint_index import DTYPES, StoredTensor, read_index
from ds_core.state.checkpoint_reader import plan_reads, run_reads
from ds_core.state.checkpoint_writer import Entry, write_safetensors

MAX_SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}


def export_hf(
    step_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    part: str = "model",
    tied: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a step's model as `model.safetensors`, or shards and their index, plus `config.json` if given.

    `dtype` converts floating tensors. `tied` maps names that the model shares to the name that is stored
    (by default what the part itself saved as its value "tied"): they are left out where the config says
    `tie_word_embeddings`, as Hugging Face does, and written as copies otherwise. One tensor at a time is
    in memory. Returns the files.
    Raises: DamagedCheckpoint, LookupError without that part, FileExistsError if `out_dir` has files in it.
    """
    source, out = Path(step_dir), Path(out_dir)
    index = read_index(source)
    if part not in index.parts:
        raise LookupError(f"{source} has no part {part!r}; it has {sorted(index.parts)}")
    if dtype is not None and (dtype not in DTYPES.values() or not dtype.is_floating_point):
        raise ValueError(f"dtype {dtype} is not one to export weights in; give float32, bfloat16 or float16")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; give a new directory")
    stored = dict(index.parts[part].tensors)
    for name in {box.file for tensor in stored.values() for box in tensor.boxes}:
        check_file(source, name, index.files[name], strong=False)
    shared = index.parts[part].values.get("tied", {}) if tied is None else tied
    if not (config or {}).get("tie_word_embeddings", False):
        stored |= {alias: stored[name] for alias, name in shared.items() if name in stored}
    work = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    work.mkdir(parents=True)
    try:
        names = _write_shards(source, work, part, stored, shared, dtype, max_shard_bytes)
        if config is not None:
            named = {"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}
            names.append(_write_json(work / "config.json", {**config, **named}))
        sync_directory(work)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_directory(out.parent)
    return [out / name for name in names]


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `limit` bytes (a larger tensor has a shard of its own)."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes={limit}: give at least 1")
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_shards(
    source: Path,
    work: Path,
    part: str,
    stored: Mapping[str, StoredTensor],
    shared: Mapping[str, str],
    dtype: torch.dtype | None,
    limit: int,
) -> list[str]:
    kinds = {
        name: dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        for name, tensor in stored.items()
    }
    sizes = {name: math.prod(tensor.shape) * kinds[name].itemsize for name, tensor in stored.items()}
    shards = plan_shards(sizes, limit)
    weight_map: dict[str, str] = {}
    names = []
    for number, members in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = []
        for key in sorted(members, key=lambda key: -kinds[key].itemsize):
            read = partial(read_tensor, source, part, shared.get(key, key), stored[key], kinds[key])
            entries.append(Entry(key, kinds[key], tuple(stored[key].shape), read))
        write_safetensors(work / name, entries, metadata=_METADATA)
        weight_map |= dict.fromkeys(members, name)
        names.append(name)
    if len(shards) > 1:
        listing = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        names.append(_write_json(work / "model.safetensors.index.json", listing))
    return names


def read_tensor(
    source: Path, part: str, name: str, stored: StoredTensor, dtype: torch.dtype | None = None
) -> Tensor:
    """One whole tensor of a step, flat, from wherever its boxes lie."""
    flat = torch.empty(stored.numel, dtype=dtype or stored.dtype)
    reads, _ = plan_reads(source, [(part, name, stored, flat.view(stored.shape))])
    run_reads(source, reads)
    return flat


def _write_json(path: Path, value: Mapping[str, Any]) -> str:
    put_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
    return path.name


def parse_dtype(name: str) -> torch.dtype:
    """A floating dtype by name: "bfloat16", "bf16", "float32"...

    Raises: ValueError with the allowed names.
    """
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    floating = {key: dtype for key, dtype in DTYPES.items() if dtype.is_floating_point}
    if short.get(name, name) not in floating:
        raise ValueError(f"dtype {name!r}; allowed: {', '.join(sorted([*floating, *short]))}")
    return floating[short.get(name, name)]


def parse_bytes(text: str) -> int:
    """A number of bytes from "500MB", "5GB", "5GiB" or "123".

    Raises: ValueError.
    """
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.strip().upper()
    unit = next(unit for unit in units if number.endswith(unit))
    try:
        return int(float(number.removesuffix(unit)) * units[unit])
    except ValueError as error:
        raise ValueError(f"size {text!r}: give bytes, such as 500MB, 5GB or 2GiB") from error
