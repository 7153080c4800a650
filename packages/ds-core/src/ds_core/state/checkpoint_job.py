"""One rank's share of one save, as it runs in the writer's thread: snapshot, files, commit."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_core.state import checkpoint_commit as commit
from ds_core.state.checkpoint_index import (
    INDEX,
    FileRecord,
    Index,
    SaveError,
    StoredBox,
    StoredPart,
    StoredTensor,
)
from ds_core.state.checkpoint_plan import WritePlan
from ds_core.state.checkpoint_staging import Snapshot
from ds_core.state.checkpoint_writer import Entry, pack, write_files
from ds_core.state.layout import Box

log = logging.getLogger(__name__)


class SaveHandle:
    """A save under way. Its error is raised once: by `result`, or by the store's next save, wait or close."""

    def __init__(self, path: Path) -> None:
        self._path, self._done = path, threading.Event()
        self._error: SaveError | None = None
        self._told = False

    def done(self) -> bool:
        """Whether it has been committed or has failed."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done; False if `timeout` seconds pass before."""
        return self._done.wait(timeout)

    def exception(self, timeout: float | None = None) -> SaveError | None:
        """The error it failed with, None if it was committed.

        Raises: TimeoutError if it is not done within `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the save to {self._path} is not done after {timeout} s")
        self._told = True
        return self._error

    def result(self, timeout: float | None = None) -> Path:
        """The step's directory, once it is complete.

        Raises: SaveError naming the rank, path and bytes if it failed; TimeoutError.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._path

    def settle(self) -> None:
        """Wait, and raise the error unless it was raised before."""
        self._done.wait()
        if self._error is not None and not self._told:
            self.result()

    def finish(self, error: SaveError | None) -> None:
        """For the writer: what became of it."""
        self._error = error
        self._done.set()


@dataclass(frozen=True, slots=True)
class Owned:
    """One box that this rank writes: whose it is, its name in the file, its memory, flat; see FlatShard."""

    part: str
    name: str
    box: Box
    key: str
    memory: Tensor
    let_go: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Everything the thread needs; it asks nothing of torch.distributed."""

    directory: Path
    step: int
    nonce: int
    rank: int
    world: int
    owned: list[Owned]
    values: str
    plan: WritePlan
    keep: int | None
    timeout_s: float
    snapshot: Snapshot | None = None

    def run(self, handle: SaveHandle) -> None:
        """Write, meet the other ranks, commit; never raises: the handle gets the outcome."""
        work = commit.hidden_path(self.directory, self.step, self.nonce)
        final = self.directory / commit.step_name(self.step)
        meeting = commit.Meeting(work, final, self.rank, self.world, self.timeout_s)
        error: SaveError | None = None
        try:
            if self.snapshot is not None:
                self.snapshot.copy_late()
            manifest = self._write(work)
            if self.snapshot is not None:
                self.snapshot.let_go()
            if self.rank == 0:
                self._commit(work, meeting, manifest)
            else:
                meeting.hand_in(manifest)
                meeting.await_outcome()
        except BaseException as caught:
            error = self._explain(caught)
            self._abandon(work, meeting, error)
        finally:
            if self.snapshot is not None:
                self.snapshot.let_go()
            handle.finish(error)

    def _write(self, work: Path) -> dict[str, Any]:
        """This rank's files, and what it tells rank 0 about them."""
        if not work.is_dir():
            reason = "the directory that rank 0 made is not here; give one that all ranks share"
            raise SaveError(reason, rank=self.rank, path=str(work))
        if self.rank == 0:
            commit.clean(self.directory, work)
        by_key = {owned.key: owned for owned in self.owned}
        packed = pack([Entry(o.key, o.memory.dtype, o.box[1], o.memory, o.let_go) for o in self.owned])
        files = [(self._file_name(number), entries) for number, entries in enumerate(packed)]
        records = write_files(work, files, rank=self.rank)
        boxes = []
        for name, entries in files:
            for owned in (by_key[entry.name] for entry in entries):
                boxes.append([owned.part, owned.name, name, *owned.box])
        described = {name: [record.bytes, record.sha256, record.sum64] for name, record in records.items()}
        return {"files": described, "boxes": boxes, "values": self.values}

    def _file_name(self, number: int) -> str:
        return f"shard-{self.rank:05d}-{number:03d}.safetensors"

    def _commit(self, work: Path, meeting: commit.Meeting, manifest: dict[str, Any]) -> None:
        manifests = [manifest, *(meeting.collect() if self.world > 1 else [])]
        index = merge(self.step, self.plan, manifests)
        index.check_boxes(str(work / INDEX))
        commit.put_file(work / INDEX, index.encode())
        commit.publish(self.directory, work, self.step, self.nonce)
        if self.keep is not None:
            commit.retain(self.directory, self.keep, self.step, self.nonce)

    def _explain(self, caught: BaseException) -> SaveError:
        if isinstance(caught, SaveError):
            return caught
        error = SaveError(f"{type(caught).__name__}: {caught}", rank=self.rank)
        error.__cause__ = caught
        return error

    def _abandon(self, work: Path, meeting: commit.Meeting, error: SaveError) -> None:
        """Free the disk, tell the other ranks, and log it even if nobody asks the handle."""
        log.error("saving step %d failed: %s", self.step, error)
        for path in work.glob(f"shard-{self.rank:05d}-*"):
            path.unlink(missing_ok=True)
        if self.world > 1 and work.is_dir():
            meeting.fail(error)
        elif work.is_dir():
            commit.discard(work)


def merge(step: int, plan: WritePlan, manifests: list[dict[str, Any]]) -> Index:
    """The index of what all ranks wrote.

    Raises: ValueError if ranks give different JSON values for the same name.
    """
    index = Index(step, {}, {})
    for part, stored in plan.parts.items():
        tensors = {name: StoredTensor(tensor.dtype, tensor.shape) for name, tensor in stored.tensors.items()}
        index.parts[part] = StoredPart(tensors)
    for rank, manifest in enumerate(manifests):
        for name, record in manifest["files"].items():
            index.files[name] = FileRecord(*record)
        for part, name, file, offsets, sizes in manifest["boxes"]:
            box = StoredBox(file, tuple(offsets), tuple(sizes))
            index.parts[part].tensors[name].boxes.append(box)
        told = json.loads(manifest["values"])
        if rank == 0:
            index.user = told["user"]
        for part, values in told["parts"].items():
            known = index.parts.setdefault(part, StoredPart()).values
            for name, value in values.items():
                if name in known and json.dumps(known[name]) != json.dumps(value):
                    raise ValueError(
                        f"{part}/{name} is {known[name]!r} on an earlier rank and {value!r} on rank {rank}; "
                        "make it equal on all ranks, or give each rank's its own name"
                    )
                known[name] = value
    return index
