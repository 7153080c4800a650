"""Safetensors files in one pass over memory: copy a chunk into cache, hash and write it, fsync last."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_core.state.checkpoint_digest import CHUNK, Digest
from ds_core.state.checkpoint_index import SAFETENSORS_NAMES, FileRecord, SaveError
from ds_core.state.threads import in_threads

# A file is hashed by one thread, so several files per rank are what lets threads share the work.
_MIN_FILE_BYTES = 32 << 20
_MAX_FILE_BYTES = 2 << 30
_FILES_PER_RANK = 6
_SYNC_FILE_RANGE_WRITE = 2
# One large write makes the kernel take page-cache memory in 2 MiB blocks, which on a virtual machine are the
# ones handed back to the host: paging them in again was measured to cost twice the whole save. Smaller
# writes take what is at hand.
_WRITE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its name there, and flat memory, or what gives it when its turn comes; `let_go`
    is called when it has been read.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    source: Tensor | Callable[[], Tensor]
    let_go: Callable[[], object] | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def pack(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries grouped into files of similar size, widest dtypes first so that every tensor is aligned."""
    total = sum(entry.bytes for entry in entries)
    target = min(_MAX_FILE_BYTES, max(_MIN_FILE_BYTES, math.ceil(total / _FILES_PER_RANK)))
    files: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not files or (entry.bytes > room and room < target):
            files.append([])
            room = target
        files[-1].append(entry)
        room -= entry.bytes
    return [sorted(file, key=lambda entry: -entry.dtype.itemsize) for file in files]


def write_files(
    directory: Path, files: Sequence[tuple[str, Sequence[Entry]]], *, rank: int
) -> dict[str, FileRecord]:
    """Write, hash and fsync every (name, entries) in a few threads, the biggest first.

    Raises: SaveError with the path, the bytes wanted and the bytes written.
    """
    records: dict[str, FileRecord] = {}
    local = threading.local()

    def write(file: tuple[str, Sequence[Entry]]) -> None:
        name, entries = file
        if not hasattr(local, "buffer"):
            pinned = any(isinstance(e.source, Tensor) and e.source.device.type != "cpu" for e in entries)
            local.buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned)
        records[name] = write_safetensors(directory / name, entries, rank=rank, buffer=local.buffer)

    in_threads(write, sorted(files, key=lambda file: -sum(entry.bytes for entry in file[1])))
    return records


def safetensors_header(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """The length-prefixed JSON header, padded so that the data starts 8-byte aligned."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors would both be called {entry.name!r} in one file; rename one")
        header[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.sizes),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    *,
    rank: int = 0,
    buffer: Tensor | None = None,
    metadata: dict[str, str] | None = None,
) -> FileRecord:
    """Write one new safetensors file and fsync it; the entries stay in the order given.

    Raises: SaveError with the path, the bytes wanted and the bytes written.
    """
    header = safetensors_header(entries, metadata)
    wanted = len(header) + sum(entry.bytes for entry in entries)
    buffer = torch.empty(CHUNK, dtype=torch.uint8) if buffer is None else buffer
    digest, got = Digest(), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for chunk in _chunks(header, entries, buffer):
                digest.update(chunk)
                count = _write_all(descriptor, chunk)
                _start_writeback(descriptor, got, count)
                got += count
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        code = error.errno or errno.EIO
        reason = f"cannot write the checkpoint: {os.strerror(code)}; {_advice(code)}"
        done = _size(path)
        raise SaveError(reason, rank=rank, path=str(path), wanted=wanted, got=done, code=code) from error
    return digest.record()


def _advice(code: int) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "free space, or keep fewer checkpoints (keep=)"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a directory that this user may write to"
    if code == errno.ENOENT:
        return "the directory went away, or is not on a file system that every rank shares"
    return "earlier checkpoints are untouched"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _write_all(descriptor: int, chunk: NDArray[np.uint8]) -> int:
    view, done = chunk.data, 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + _WRITE_BYTES])
    return done


def _start_writeback(descriptor: int, at: int, count: int) -> None:
    """Have the disk begin now, while the next chunk is hashed; without it all writing waits for the fsync."""
    start = _sync_file_range()
    if start is not None:
        start(descriptor, ctypes.c_int64(at), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


def _chunks(header: bytes, entries: Sequence[Entry], buffer: Tensor) -> Iterator[NDArray[np.uint8]]:
    """The file's bytes as full buffers (the last one shorter); each is valid until the next is asked for."""
    out, fill = buffer.numpy(), 0
    for source in _sources(header, entries):
        at, total = 0, source.numel()
        host = source.numpy() if source.device.type == "cpu" else None
        while at < total:
            count = min(len(out) - fill, total - at)
            if host is not None:
                np.copyto(out[fill : fill + count], host[at : at + count])
            else:
                buffer[fill : fill + count].copy_(source[at : at + count])
            fill, at = fill + count, at + count
            if fill == len(out):
                yield out
                fill = 0
    if fill:
        yield out[:fill]


def _sources(header: bytes, entries: Sequence[Entry]) -> Iterator[Tensor]:
    yield torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for entry in entries:
        if entry.bytes:
            source = entry.source if isinstance(entry.source, Tensor) else entry.source()
            yield source.view(torch.uint8)
            if entry.let_go is not None:
                entry.let_go()
