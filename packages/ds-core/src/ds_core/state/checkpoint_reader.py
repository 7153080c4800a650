"""Reading boxes back into whatever cut the program has now: from the file into the target's memory."""

from __future__ import annotations

import json
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ds_core.state.checkpoint_digest import CHUNK, check_file, check_size
from ds_core.state.checkpoint_index import (
    SAFETENSORS_NAMES,
    DamagedCheckpoint,
    Index,
    StoredTensor,
    entry_name,
    read_index,
)
from ds_core.state.checkpoint_peers import Peers
from ds_core.state.shard import FlatShard, Json, Saveable
from ds_core.state.threads import in_threads

_READ_BYTES = 64 << 20  # the longest single read, so that threads share big tensors


@dataclass(frozen=True, slots=True)
class Run:
    """Flat elements [start, end) of a tensor that lie one after another in a file, from byte `at`."""

    start: int
    end: int
    file: str
    at: int


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a file that belong in `target`, flat and of dtype `dtype` in the file; see FlatShard."""

    file: str
    at: int
    dtype: torch.dtype
    target: Tensor
    let_go: Callable[[], object] | None = None


def load_parts(step_dir: Path, parts: Mapping[str, Saveable], peers: Peers, *, strong: bool) -> Json:
    """Fill every part from a step directory; see `CheckpointStore.load`."""
    doing, error, index = f"loading {step_dir}", None, None
    reads: list[Read] = []
    copies: list[tuple[Tensor, Tensor]] = []
    try:
        index = read_index(step_dir)
        targets = _targets(step_dir, index, parts)
        _check_files(step_dir, index, parts, peers, strong=strong)
        reads, copies = plan_reads(step_dir, targets)
    except Exception as caught:
        error = caught
    peers.agree([], error, doing)
    assert index is not None
    try:
        run_reads(step_dir, reads)
        for target, flat in copies:
            target.copy_(flat.view(target.shape))
        for name, part in parts.items():
            part.load_state_dict(index.parts[name].values)
    except Exception as caught:
        error = caught
    peers.agree([], error, doing)
    return index.user


def _targets(
    step_dir: Path, index: Index, parts: Mapping[str, Saveable]
) -> list[tuple[str, str, StoredTensor, Tensor | FlatShard]]:
    """Every part's targets, checked against what is stored, before anything is read."""
    missing = [name for name in parts if name not in index.parts]
    if missing:
        raise LookupError(f"{step_dir} has no part {missing}; it has {sorted(index.parts)}")
    found = []
    for name, part in parts.items():
        stored = index.parts[name].tensors
        targets = part.load_targets({key: tensor.described for key, tensor in stored.items()})
        for key, target in targets.items():
            found.append((name, key, _checked(f"{name}/{key}", stored.get(key), target), target))
    return found


def _checked(where: str, stored: StoredTensor | None, target: Tensor | FlatShard) -> StoredTensor:
    if stored is None:
        raise ValueError(f"{where} is asked for and is not in the checkpoint")
    if tuple(target.shape) != tuple(stored.shape):
        raise ValueError(
            f"{where} has shape {list(target.shape)} here and {list(stored.shape)} in the checkpoint"
        )
    if isinstance(target, FlatShard):
        flat, end = target.local, target.start + target.local.numel()
        if flat.dim() != 1 or not flat.is_contiguous() or not 0 <= target.start <= end <= stored.numel:
            raise ValueError(
                f"{where}: a shard's memory must be 1-D, contiguous and inside the tensor, got shape "
                f"{list(flat.shape)}, elements [{target.start}, {end}) of {stored.numel}"
            )
    elif target.is_meta:
        raise ValueError(f"{where} has no memory (meta device) to load into; materialise it first")
    return stored


def _check_files(
    step_dir: Path, index: Index, parts: Mapping[str, Saveable], peers: Peers, *, strong: bool
) -> None:
    """Ranks share the files that the parts need, each checks its own; sizes are checked by all."""
    needed = {
        box.file for name in parts for tensor in index.parts[name].tensors.values() for box in tensor.boxes
    }
    for name in sorted(needed):
        check_size(step_dir, name, index.files[name])
    by_size = sorted(needed, key=lambda name: (-index.files[name].bytes, name))
    mine = by_size[peers.rank :: peers.world]

    def check(name: str) -> None:
        check_file(step_dir, name, index.files[name], strong=strong)

    in_threads(check, mine)


def plan_reads(
    step_dir: Path, targets: Sequence[tuple[str, str, StoredTensor, Tensor | FlatShard]]
) -> tuple[list[Read], list[tuple[Tensor, Tensor]]]:
    """The reads that fill the targets, and (target, flat) for those whose memory is not in flat order."""
    headers: dict[str, dict[str, Placed]] = {}
    reads: list[Read] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for part, name, stored, target in targets:
        if isinstance(target, FlatShard):
            flat, start = target.local.detach(), target.start
        elif target.is_contiguous():
            flat, start = target.detach().view(-1), 0
        else:
            flat, start = torch.empty(stored.numel, dtype=target.dtype, device=target.device), 0
            copies.append((target.detach(), flat))
        if flat.numel():
            runs = stored_runs(step_dir, part, name, stored, headers)
            let_go = target.let_go if isinstance(target, FlatShard) else None
            found = _cover(f"{part}/{name}", runs, stored.dtype, flat, start)
            reads += [replace(read, let_go=let_go) for read in found] if let_go else found
    return reads, copies


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a safetensors file keeps one entry."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    bytes: int


def read_header(path: Path) -> dict[str, Placed]:
    """The entries of a safetensors file, with absolute byte positions.

    Raises: DamagedCheckpoint if the header is not understood.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"its header claims {size} bytes")
            header = json.loads(file.read(size))
        return {
            name: Placed(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + size + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedCheckpoint(
            f"{path} is not a whole safetensors file: {error}; load another step"
        ) from error


def stored_runs(
    step_dir: Path, part: str, name: str, stored: StoredTensor, headers: dict[str, dict[str, Placed]]
) -> list[Run]:
    """A stored tensor as runs in flat order; `headers` remembers the files already looked into."""
    runs: list[Run] = []
    for box in stored.boxes:
        if box.file not in headers:
            headers[box.file] = read_header(step_dir / box.file)
        key = entry_name(part, name, (box.offsets, box.sizes), tuple(stored.shape))
        placed = headers[box.file].get(key)
        wanted = (SAFETENSORS_NAMES[stored.dtype], box.sizes)
        if placed is None or (placed.dtype, placed.shape) != wanted:
            given = "nothing" if placed is None else f"{placed.dtype} {list(placed.shape)}"
            raise DamagedCheckpoint(
                f"{step_dir / box.file} holds {given} under {key!r}, "
                f"the index says {wanted[0]} {list(wanted[1])}"
            )
        at = placed.at
        for start, length in box_runs(box.offsets, box.sizes, tuple(stored.shape)):
            runs.append(Run(start, start + length, box.file, at))
            at += length * stored.dtype.itemsize
    return sorted(runs, key=lambda run: run.start)


def check_entries(step_dir: Path, index: Index) -> None:
    """Raise DamagedCheckpoint unless every box of the index is in its file, with its dtype and sizes."""
    headers: dict[str, dict[str, Placed]] = {}
    for part_name, part in index.parts.items():
        for name, stored in part.tensors.items():
            stored_runs(step_dir, part_name, name, stored, headers)


def box_runs(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The (flat start, length) runs of a box in a row-major tensor of `shape`, in the box's own order."""
    if math.prod(sizes) == 0:
        return
    inner = len(shape)  # dims from `inner` on are whole: together with the one before, they make one run
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(0, inner - 1)
    length = math.prod(sizes[outer:])
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    for number in range(math.prod(sizes[:outer])):
        start, rest = base, number
        for dim in reversed(range(outer)):
            rest, position = divmod(rest, sizes[dim])
            start += position * strides[dim]
        yield start, length


def _cover(where: str, runs: Sequence[Run], dtype: torch.dtype, flat: Tensor, start: int) -> Iterator[Read]:
    """Reads that fill `flat` with elements [start, start + len) of the tensor."""
    at, end = start, start + flat.numel()
    begin = max(0, bisect_right(runs, start, key=lambda run: run.start) - 1)
    longest = max(1, _READ_BYTES // dtype.itemsize)
    for run in runs[begin:]:
        if run.start >= end or at < run.start:
            break
        while at < min(run.end, end):
            stop = min(run.end, end, at + longest)
            byte = run.at + (at - run.start) * dtype.itemsize
            yield Read(run.file, byte, dtype, flat[at - start : stop - start])
            at = stop
    if at < end:
        raise DamagedCheckpoint(f"{where}: elements [{at}, {end}) are in no file of the checkpoint")


def run_reads(step_dir: Path, reads: Sequence[Read]) -> None:
    """Carry out the reads, several threads at a time, in file order.

    Raises: DamagedCheckpoint if a file ends early.
    """
    descriptors = {
        name: os.open(step_dir / name, os.O_RDONLY) for name in sorted({read.file for read in reads})
    }
    local = threading.local()

    def fill(read: Read) -> None:
        path, descriptor = step_dir / read.file, descriptors[read.file]
        try:
            place(read, path, descriptor)
        finally:
            if read.let_go is not None:
                read.let_go()

    def place(read: Read, path: Path, descriptor: int) -> None:
        if read.target.device.type == "cpu" and read.target.dtype == read.dtype:
            _read_into(path, descriptor, read.at, read.target.view(torch.uint8))
            return
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=read.target.device.type != "cpu")
        step = CHUNK // read.dtype.itemsize
        for begin in range(0, read.target.numel(), step):
            piece = read.target[begin : begin + step]
            raw = local.buffer[: piece.numel() * read.dtype.itemsize]
            _read_into(path, descriptor, read.at + begin * read.dtype.itemsize, raw)
            piece.copy_(raw.view(read.dtype))

    try:
        in_threads(fill, sorted(reads, key=lambda read: (read.file, read.at)))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _read_into(path: Path, descriptor: int, at: int, target: Tensor) -> None:
    view, done = target.numpy().data, 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], at + done)
        if not got:
            raise DamagedCheckpoint(f"{path} ends at byte {at + done}, wanted {len(view)} bytes from {at}")
        done += got
