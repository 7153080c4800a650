"""DeepSpeed's save and load by tag, over the suite's own checkpoints."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ds_core.state.checkpoint import CheckpointStore
from ds_core.state.checkpoint_index import read_index
from ds_core.state.owner import FlatOwner
from ds_core.state.saved import saved_buffers, tied_names
from ds_core.state.shard import Json
from ds_core.train.engine import Engine

_log = logging.getLogger("ds_core")
_LATEST = "latest"


def save(
    engine: Engine,
    folder: Path,
    tag: str | None,
    client_state: Json,
    *,
    save_latest: bool = True,
    validation: str = "Warn",
) -> bool:
    """Write everything the engine has as `folder/tag` (default "global_step<n>"), and name it in `latest`.

    Collective. Raises: ValueError when ranks give different tags and `validation` is "Fail"; "Warn" logs it.
    """
    tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    _check_tag(engine, tag, validation)
    with CheckpointStore(folder / tag) as store:
        store.save(engine.global_steps, engine.parts(), user=client_state)
    if save_latest and engine.owner.everyone.rank == 0:
        _replace(folder / _LATEST, tag.encode())
    engine.owner.mesh.barrier()
    return True


def load(
    engine: Engine,
    folder: Path,
    tag: str | None,
    *,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
) -> tuple[str | None, Json]:
    """Read `folder/tag` (default: what `latest` names) into the engine, at any world size and stage.

    (None, None) with a warning when there is no `latest`, as DeepSpeed does. Collective.
    Raises: LookupError naming the tags there are; ValueError when the model has other shapes.
    """
    if not load_module_strict:
        raise ValueError(
            "load_module_strict=False is not there: names and shapes must match; load parts of a model with"
            " `ds checkpoint export` and load_state_dict before initialize()"
        )
    if tag is None:
        latest = folder / _LATEST
        if not latest.is_file():
            _log.warning("no file %s: nothing is loaded; give a tag, or check the directory", latest)
            return None, None
        tag = latest.read_text().strip()
    store = CheckpointStore(folder / str(tag))
    step = store.latest()
    if step is None:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        raise LookupError(
            f"no complete checkpoint {tag!r} in {folder}; tags there: {', '.join(there) or 'none'}"
        )
    wanted = {"model"}
    if not load_module_only:
        wanted |= {"engine", "scaler", "loader"}
        wanted |= {"optimizer"} if load_optimizer_states else set()
        wanted |= {"scheduler"} if load_lr_scheduler_states else set()
    saved = read_index(store.path(step)).parts
    needed = wanted & {"model", "optimizer"}
    parts = {
        name: part
        for name, part in engine.parts().items()
        if name in wanted and (name in needed | set(saved))
    }
    return str(folder / str(tag)), store.load(parts, step)


def save_model(owner: FlatOwner, folder: Path, filename: str) -> bool:
    """Whole parameters in the model's dtypes and buffers, gathered unit by unit, written by rank 0.

    Tied parameters are written once; the file's metadata maps their other names, as safetensors' own
    save_model does. Collective. Extra host memory on rank 0: the model.
    """
    if not filename.endswith(".safetensors"):
        raise ValueError(
            f"given save_filename {filename!r}; allowed: a name that ends in .safetensors, there is no pickle"
        )
    tensors: dict[str, Tensor] = {}
    for unit in owner.units:
        with owner.whole([unit]):
            if owner.everyone.rank == 0:
                for slot, param in zip(unit.layout.slots, unit.params, strict=True):
                    tensors[slot.fqn] = param.detach().to("cpu", copy=True)
    if owner.everyone.rank == 0:
        from safetensors.torch import save as to_bytes

        buffers = {
            name: buffer.detach().cpu().contiguous() for name, buffer in saved_buffers(owner.model).items()
        }
        aliases = tied_names(owner.model)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / filename, to_bytes({**tensors, **buffers}, metadata={"format": "pt", **aliases}))
    owner.mesh.barrier()
    return True


def _check_tag(engine: Engine, tag: str, validation: str) -> None:
    if not tag or Path(tag).name != tag:
        raise ValueError(f"given tag {tag!r}; allowed: a plain name without slashes, such as global_step100")
    if validation == "Ignore" or engine.owner.everyone.world == 1:
        return
    number = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big")
    ends = torch.tensor([number, -number])
    engine.owner.control.all_reduce(ends, op="max", about="a checkpoint's tag").wait()
    if int(ends[0]) == -int(ends[1]):
        return
    rank = engine.owner.everyone.rank
    text = f"rank {rank} saves with tag {tag!r}, another rank with another; give all ranks the same"
    if validation == "Fail":
        raise ValueError(text)
    _log.warning(text)


def _replace(path: Path, content: bytes) -> None:
    """All of the file or none of it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
