"""Opening a Hugging Face directory of safetensors files: every tensor's place, checked before any is read."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_core.state.checkpoint_index import SAFETENSORS_NAMES, DamagedCheckpoint
from ds_core.state.checkpoint_reader import Placed, read_header

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_PIECE_BYTES = 4 << 20  # the most that is in memory of what must be converted


class WeightFile:
    """An open safetensors file; it is closed when the last tensor in it is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, at: int, raw: Tensor) -> None:
        """Bytes from `at` on into `raw`, uint8 on the host. Raises DamagedCheckpoint when there are fewer."""
        view, done = raw.numpy().data, 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], at + done)
            if not got:
                raise DamagedCheckpoint(
                    f"{self.path} was cut short while it was read: wanted {at + len(view)} bytes, "
                    f"found {at + done}"
                )
            done += got


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file."""

    file: WeightFile
    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int

    def read(self, start: int, out: Tensor) -> None:
        """Straight into `out` where that is the same dtype on the host, else through a small buffer."""
        size, numel = self.dtype.itemsize, out.numel()
        if out.dtype == self.dtype and out.device.type == "cpu":
            self.file.read_into(self.at + start * size, out.view(torch.uint8))
            return
        step = _PIECE_BYTES // size
        raw = torch.empty(min(step, numel) * size, dtype=torch.uint8)
        for begin in range(0, numel, step):
            count = min(step, numel - begin)
            self.file.read_into(self.at + (start + begin) * size, raw[: count * size])
            out[begin : begin + count].copy_(raw[: count * size].view(self.dtype))


def open_directory(directory: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of `model.safetensors`, or of the files of `model.safetensors.index.json`, by name.

    Only headers are read.
    Raises: FileNotFoundError without such files, DamagedCheckpoint naming a file that is missing, cut short
    or not understood.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a directory: give one that save_pretrained wrote (download a model first)"
        )
    listed: dict[str, str] | None = None
    if (root / ONE_FILE).exists():
        names = [ONE_FILE]
    elif (root / INDEX).exists():
        listed = _listed(root / INDEX)
        names = sorted(set(listed.values()))
    else:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{root} has neither {ONE_FILE} nor {INDEX}; it holds {found}")
    tensors: dict[str, Stored] = {}
    for name in names:
        tensors |= _open_file(root / name)
    absent = sorted(set(listed or ()) - set(tensors))
    if absent:
        assert listed is not None
        raise DamagedCheckpoint(
            f"{root / INDEX} says {absent[0]} is in {listed[absent[0]]}, and it is not "
            f"({len(absent)} tensors like it); download the directory again"
        )
    return tensors


def _listed(index: Path) -> dict[str, str]:
    try:
        listed = dict(json.loads(index.read_bytes())["weight_map"])
        strange = [name for name in listed.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{index} is not an index of safetensors files: {error!r}") from error
    if strange:
        raise DamagedCheckpoint(f"{index} names {strange[0]!r}, which is no file beside it")
    return listed


def _open_file(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing; download the directory again")
    placed = read_header(path)
    _check_size(path, placed)
    unknown = sorted({entry.dtype for entry in placed.values()} - set(_DTYPES))
    if unknown:
        raise DamagedCheckpoint(f"{path} holds dtypes that are not known here: {', '.join(unknown)}")
    file = WeightFile(path)
    return {name: Stored(file, entry.shape, _DTYPES[entry.dtype], entry.at) for name, entry in placed.items()}


def _check_size(path: Path, placed: dict[str, Placed]) -> None:
    """The last tensor ends where the file does, and each is as long as its shape says."""
    wanted, found = max((entry.at + entry.bytes for entry in placed.values()), default=0), path.stat().st_size
    if placed and wanted != found:
        raise DamagedCheckpoint(
            f"{path} is damaged: its header wants {wanted} bytes, the file has {found}; download it again"
        )
    for name, entry in placed.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            continue
        size = torch.Size(entry.shape).numel() * dtype.itemsize
        if size != entry.bytes:
            raise DamagedCheckpoint(
                f"{path} is damaged: {name} {entry.dtype} {list(entry.shape)} wants {size} bytes, its place "
                f"has {entry.bytes}"
            )
