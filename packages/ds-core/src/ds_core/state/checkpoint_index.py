"""The checkpoint format as data: what index.json says of every tensor and file, and its errors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_core.state.layout import Box
from ds_core.state.shard import Json, SavedTensor

FORMAT = "ds-checkpoint"
VERSION = 1
INDEX = "index.json"

# torch dtype -> its name in a safetensors header
SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_NAMES}


class SaveError(OSError):
    """A save that did not become a checkpoint: which rank failed, on which path, bytes wanted and got.

    The checkpoints that were there before are untouched.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        path: str = "",
        wanted: int = 0,
        got: int = 0,
        code: int | None = None,
    ) -> None:
        detail = f"rank {rank}: {message}"
        if path:
            detail += f" [path {path}"
            detail += f", wanted {wanted} bytes, got {got}]" if wanted else "]"
        super().__init__(code, detail)
        self.rank, self.path, self.wanted, self.got, self.reason = rank, path, wanted, got, message

    def __str__(self) -> str:
        return str(self.args[1])


class DamagedCheckpoint(ValueError):
    """A checkpoint that must not be loaded: a file is missing, cut short, changed, or not understood."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its size, its sha256, and `sum64`, the quick check (see checkpoint_digest.py)."""

    bytes: int
    sha256: str
    sum64: str


@dataclass(frozen=True, slots=True)
class StoredBox:
    """One box of a tensor and the file that holds it, under `entry_name`."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(slots=True)
class StoredTensor:
    """A tensor of the checkpoint: its whole shape, and the boxes that make it up (each element once)."""

    dtype: torch.dtype
    shape: torch.Size
    boxes: list[StoredBox] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def described(self) -> SavedTensor:
        return SavedTensor(self.shape, self.dtype)


@dataclass(slots=True)
class StoredPart:
    """One named part: tensors and JSON values."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)


@dataclass(slots=True)
class Index:
    """Everything `index.json` holds."""

    step: int
    files: dict[str, FileRecord]
    parts: dict[str, StoredPart]
    user: Json = None

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def encode(self) -> bytes:
        """The JSON text of the file."""
        parts = {}
        for part_name, part in self.parts.items():
            tensors = {
                name: {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "boxes": [
                        {"file": box.file, "offsets": list(box.offsets), "sizes": list(box.sizes)}
                        for box in tensor.boxes
                    ],
                }
                for name, tensor in part.tensors.items()
            }
            parts[part_name] = {"tensors": tensors, "values": part.values}
        files = {
            name: {"bytes": record.bytes, "sha256": record.sha256, "sum64": record.sum64}
            for name, record in sorted(self.files.items())
        }
        head = {"format": FORMAT, "version": VERSION, "step": self.step}
        return json.dumps({**head, "user": self.user, "files": files, "parts": parts}).encode()

    @classmethod
    def decode(cls, text: bytes, path: str) -> Index:
        """Read the JSON text of the file at `path` (named in errors).

        Raises: DamagedCheckpoint if it is cut short, of another format or version, or refers to nowhere.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DamagedCheckpoint(f"{path} is not whole JSON ({error}); load another step") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            given = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise DamagedCheckpoint(
                f"{path} has format {given!r}, wanted {FORMAT!r}: not a checkpoint of ds-core"
            )
        if raw.get("version") != VERSION:
            raise DamagedCheckpoint(
                f"{path} has format version {raw.get('version')!r}, this ds-core reads version {VERSION}; "
                "load it with the ds-core that wrote it, or upgrade ds-core"
            )
        try:
            files = {name: FileRecord(**record) for name, record in raw["files"].items()}
            parts = {name: _decode_part(part) for name, part in raw["parts"].items()}
            index = cls(raw["step"], files, parts, raw["user"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path} lacks or misspells {error}; load another step") from error
        index.check_boxes(path)
        return index

    def check_boxes(self, path: str) -> None:
        """Raise DamagedCheckpoint unless every tensor's boxes lie in it, in known files, and fill it."""
        for part_name, part in self.parts.items():
            for name, tensor in part.tensors.items():
                held = 0
                for box in tensor.boxes:
                    held += math.prod(box.sizes)
                    inside = len(box.offsets) == len(box.sizes) == len(tensor.shape) and all(
                        offset >= 0 and size >= 0 and offset + size <= dim
                        for offset, size, dim in zip(box.offsets, box.sizes, tensor.shape, strict=True)
                    )
                    if not inside or box.file not in self.files or os.path.basename(box.file) != box.file:
                        raise DamagedCheckpoint(
                            f"{path}: {part_name}/{name} has a box that is nowhere: {box}"
                        )
                if held != tensor.numel:
                    raise DamagedCheckpoint(
                        f"{path}: {part_name}/{name} of shape {list(tensor.shape)} has {tensor.numel} "
                        f"elements, its boxes hold {held}"
                    )


def _decode_part(raw: Mapping[str, Any]) -> StoredPart:
    tensors = {}
    for name, entry in raw["tensors"].items():
        boxes = [StoredBox(box["file"], tuple(box["offsets"]), tuple(box["sizes"])) for box in entry["boxes"]]
        tensors[name] = StoredTensor(DTYPES[entry["dtype"]], torch.Size(entry["shape"]), boxes)
    return StoredPart(tensors, dict(raw["values"]))


def read_index(step_dir: str | os.PathLike[str]) -> Index:
    """The index of a step directory.

    Raises: DamagedCheckpoint if there is none or it cannot be understood.
    """
    path = Path(step_dir) / INDEX
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(
            f"{path} is missing: not a checkpoint, or one that was never finished"
        ) from error
    return Index.decode(text, str(path))


def entry_name(part: str, name: str, box: Box, shape: tuple[int, ...]) -> str:
    """The name of a box inside its safetensors file: `model/w` when whole, `model/w[0:2,3:5]` when not."""
    offsets, sizes = box
    if tuple(sizes) == tuple(shape):
        return f"{part}/{name}"
    cut = ",".join(f"{offset}:{offset + size}" for offset, size in zip(offsets, sizes, strict=True))
    return f"{part}/{name}[{cut}]"
