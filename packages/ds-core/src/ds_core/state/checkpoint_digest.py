"""Digests of checkpoint files: sha256 for proof, and a sum as fast as memory for every load."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ds_core.state.checkpoint_index import DamagedCheckpoint, FileRecord

BLOCK = 128 << 10
CHUNK = 4 << 20


class Digest:
    """sha256 and sum64 of a stream of bytes, chunk by chunk; every chunk but the last is whole blocks.

    sum64 is the sha256 of one 64-bit number per 128 KiB: the sum of its words, each times an odd weight of
    its place. Any change of one word shows, any other but for about one chance in 2^64, at ten times the
    speed of sha256. It does not withstand someone who forges; sha256 does.
    """

    def __init__(self, *, strong: bool = True) -> None:
        self._strong = hashlib.sha256() if strong else None
        self._sums = hashlib.sha256()
        self._bytes = 0

    def update(self, chunk: NDArray[np.uint8]) -> None:
        """Add the next bytes: contiguous, and whole blocks unless they are the last."""
        if self._strong is not None:
            self._strong.update(chunk.data)
        self._bytes += len(chunk)
        whole = len(chunk) // BLOCK * BLOCK
        if whole:
            self._add_sums(chunk[:whole].view(np.uint64).reshape(-1, BLOCK // 8))
        if whole < len(chunk):
            tail = np.zeros(BLOCK, np.uint8)
            tail[: len(chunk) - whole] = chunk[whole:]
            self._add_sums(tail.view(np.uint64).reshape(1, -1))

    def _add_sums(self, words: NDArray[np.uint64]) -> None:
        self._sums.update((words @ _weights()).astype("<u8").data)

    def record(self) -> FileRecord:
        """What goes into the index (`sha256` is empty without `strong`)."""
        strong = self._strong.hexdigest() if self._strong is not None else ""
        return FileRecord(self._bytes, strong, self._sums.hexdigest())


@functools.cache
def _weights() -> NDArray[np.uint64]:
    return (np.arange(BLOCK // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def digest_file(path: Path, *, strong: bool) -> FileRecord:
    """Digest a file through a small buffer that stays in cache."""
    digest, buffer = Digest(strong=strong), np.empty(CHUNK, np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while got := _fill(descriptor, buffer, at):
            digest.update(buffer[:got])
            at += got
    finally:
        os.close(descriptor)
    return digest.record()


def _fill(descriptor: int, buffer: NDArray[np.uint8], at: int) -> int:
    got = 0
    while got < len(buffer):
        count = os.preadv(descriptor, [buffer.data[got:]], at + got)
        if not count:
            break
        got += count
    return got


def check_size(step_dir: Path, name: str, record: FileRecord) -> None:
    """Raise DamagedCheckpoint when the file is missing or of another size: costs nothing."""
    path = step_dir / name
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing; load another step") from error
    if size != record.bytes:
        raise DamagedCheckpoint(f"{path} has {size} bytes, the index says {record.bytes}; load another step")


def check_file(step_dir: Path, name: str, record: FileRecord, *, strong: bool) -> None:
    """Raise DamagedCheckpoint unless the file is what the index says; `strong` compares sha256 too."""
    check_size(step_dir, name, record)
    found = digest_file(step_dir / name, strong=strong)
    kind, got, wanted = "sum64", found.sum64, record.sum64
    if strong and got == wanted:
        kind, got, wanted = "sha256", found.sha256, record.sha256
    if got != wanted:
        raise DamagedCheckpoint(
            f"{step_dir / name} was changed after it was written: {kind} is {got}, the index says {wanted}; "
            "load another step or restore the file"
        )
