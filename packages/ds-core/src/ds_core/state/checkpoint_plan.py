"""Who writes what: every element exactly once, spread over the ranks that hold it (pure data)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ds_core.state.checkpoint_index import DTYPES, SAFETENSORS_NAMES, StoredPart, StoredTensor
from ds_core.state.shard import FlatShard, Json, Saveable


@dataclass(frozen=True, slots=True)
class Held:
    """Flat elements [start, end) of a tensor that a rank holds."""

    part: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Write:
    """Flat elements [start, end) of the rank's `held`-th piece, for this rank to write."""

    held: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Every rank's writes, and every tensor of the checkpoint (without its boxes)."""

    writes: tuple[tuple[Write, ...], ...]
    parts: dict[str, StoredPart]


@dataclass(slots=True)
class Collected:
    """This rank's side of a save: pieces, their memory (flat, live), and the JSON values as text."""

    held: list[Held]
    memory: list[Tensor]
    let_go: list[Callable[[], object] | None]  # of each, see FlatShard
    values: str

    def describe(self) -> str:
        """The pieces as JSON, to be compared between ranks."""
        rows = [
            [h.part, h.name, str(h.dtype).removeprefix("torch."), list(h.shape), h.start, h.end]
            for h in self.held
        ]
        return json.dumps(rows, separators=(",", ":"))


def parse_held(text: str) -> list[Held]:
    """The inverse of `Collected.describe`, without the memory."""
    return [
        Held(part, name, DTYPES[dtype], tuple(shape), start, end)
        for part, name, dtype, shape, start, end in json.loads(text)
    ]


def collect(parts: Mapping[str, Saveable], user: Json) -> Collected:
    """Ask every part for its state, and check it.

    Raises: ValueError for a name, tensor or value that a checkpoint cannot hold.
    """
    found = Collected([], [], [], "")
    values: dict[str, dict[str, Json]] = {}
    for part, owner in parts.items():
        if not part or "/" in part:
            raise ValueError(f"part name {part!r}: give a name without '/', such as 'model'")
        values[part] = {}
        for name, value in owner.state_dict().items():
            if isinstance(value, Tensor | FlatShard):
                _collect_tensor(found, part, name, value)
            else:
                check_json(value, f"{part}/{name}")
                values[part][name] = value
    check_json(user, "user")
    found.values = json.dumps({"parts": values, "user": user})
    return found


def _collect_tensor(found: Collected, part: str, name: str, value: Tensor | FlatShard) -> None:
    where = f"{part}/{name}"
    if isinstance(value, FlatShard):
        flat, shape, start = value.local.detach(), tuple(value.shape), value.start
        if flat.dim() != 1 or not flat.is_contiguous():
            raise ValueError(f"{where}: a shard's memory must be 1-D and contiguous, got {list(flat.shape)}")
        if not 0 <= start <= start + flat.numel() <= math.prod(shape):
            raise ValueError(
                f"{where}: elements [{start}, {start + flat.numel()}) are not inside shape {list(shape)}"
            )
    else:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{where}: {type(value).__name__} ({value.layout}, {value.device}) cannot be saved; "
                "give a plain dense tensor with memory, or a FlatShard"
            )
        flat, shape, start = value.detach().contiguous().view(-1), tuple(value.shape), 0
    if flat.dtype not in SAFETENSORS_NAMES:
        raise ValueError(f"{where}: dtype {flat.dtype} cannot be saved; allowed: {', '.join(DTYPES)}")
    found.held.append(Held(part, name, flat.dtype, shape, start, start + flat.numel()))
    found.memory.append(flat)
    found.let_go.append(value.let_go if isinstance(value, FlatShard) else None)


def check_json(value: Any, where: str) -> None:
    """Raise ValueError unless `json` gives the value back as it is (tuples come back as lists)."""
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(
                    f"{where} has the key {key!r} ({type(key).__name__}); JSON keys are text: use str(key)"
                )
            check_json(item, f"{where}.{key}")
    else:
        raise ValueError(
            f"{where} is a {type(value).__name__}, which JSON cannot hold; "
            "give None, bool, int, float, str, list or dict (`.item()` makes a number of a scalar)"
        )


def plan_writes(held: Sequence[Sequence[Held]]) -> WritePlan:
    """Give each element of each tensor to one of the ranks that hold it, to the least loaded first.

    Every rank computes the same plan from the same `held`, one sequence per rank.
    Raises: ValueError when ranks disagree about a tensor, or elements are held by nobody.
    """
    tensors: dict[tuple[str, str], list[tuple[int, int, Held]]] = {}
    for rank, pieces in enumerate(held):
        for index, piece in enumerate(pieces):
            holders = tensors.setdefault((piece.part, piece.name), [])
            first = holders[0][2] if holders else piece
            if (first.dtype, first.shape) != (piece.dtype, piece.shape):
                raise ValueError(
                    f"{piece.part}/{piece.name} is {piece.dtype} {list(piece.shape)} on rank {rank} "
                    f"and {first.dtype} {list(first.shape)} on rank {holders[0][0]}"
                )
            holders.append((rank, index, piece))
    parts: dict[str, StoredPart] = {}
    shared: list[tuple[int, int, int, list[tuple[int, int]]]] = []  # bytes, start, end, holders
    for (part, name), holders in tensors.items():
        piece = holders[0][2]
        stored = StoredTensor(piece.dtype, torch.Size(piece.shape))
        parts.setdefault(part, StoredPart()).tensors[name] = stored
        for start, end, owners in _elementary(f"{part}/{name}", stored.numel, holders):
            shared.append(((end - start) * piece.dtype.itemsize, start, end, owners))
    return WritePlan(_spread(shared, len(held)), parts)


def _elementary(
    where: str, numel: int, holders: Sequence[tuple[int, int, Held]]
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Cut [0, numel) wherever a holder begins or ends: (start, end, [(rank, index)]) of each span."""
    holders = [holder for holder in holders if holder[2].start < holder[2].end]
    cuts = sorted({0, numel, *(h.start for _, _, h in holders), *(h.end for _, _, h in holders)})
    waiting = sorted(holders, key=lambda holder: -holder[2].start)
    present: list[tuple[int, int, Held]] = []
    found = []
    for start, end in pairwise(cuts):
        while waiting and waiting[-1][2].start <= start:
            present.append(waiting.pop())
        present = [holder for holder in present if holder[2].end >= end]
        if not present:
            raise ValueError(
                f"{where}: no rank holds elements [{start}, {end}) of {numel}; nothing was saved"
            )
        found.append((start, end, [(rank, index) for rank, index, _ in present]))
    return found


def _spread(
    spans: Sequence[tuple[int, int, int, list[tuple[int, int]]]], world: int
) -> tuple[tuple[Write, ...], ...]:
    """Spans that one rank holds go to it; the others, largest first, to the holder with least to write."""
    load = [0] * world
    writes: list[list[Write]] = [[] for _ in range(world)]
    by_choice = sorted(spans, key=lambda span: (len(span[3]) > 1, -span[0]))
    for size, start, end, holders in by_choice:
        rank, index = min(holders, key=lambda holder: (load[holder[0]], holder[0]))
        load[rank] += size
        writes[rank].append(Write(index, start, end))
    return tuple(tuple(sorted(mine, key=lambda w: (w.held, w.start))) for mine in writes)
