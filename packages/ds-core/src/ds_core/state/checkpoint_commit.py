"""How a checkpoint becomes visible: hidden directory, rename, `latest`; and how ranks meet in files.

[Note: all or nothing] Everything is written into `.step-N.NONCE.tmp`, hashed and fsynced; only then is the
directory renamed. A `step-N` directory is therefore complete at every moment, whoever dies when. `latest`
is written after the rename, so it can be old but never wrong.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_core.state.checkpoint_index import INDEX, SaveError

_STEP = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-(\d{8,})\.([0-9a-f]{16})\.(tmp|old)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_EXIT_GRACE_S = 20.0

log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """`step-00000010`: sorts by step."""
    return f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Complete steps, ascending."""
    if not directory.is_dir():
        return []
    found = [_STEP.fullmatch(entry.name) for entry in directory.iterdir()]
    return sorted(int(m[1]) for m in found if m and (directory / m[0] / INDEX).is_file())


def latest_step(directory: Path) -> int | None:
    """The step that `latest` names; the highest one if that is gone; None if there is none."""
    steps = list_steps(directory)
    try:
        named = _STEP.fullmatch((directory / "latest").read_text().strip())
    except FileNotFoundError:
        named = None
    if named and int(named[1]) in steps:
        return int(named[1])
    return steps[-1] if steps else None


def hidden_path(directory: Path, step: int, nonce: int, kind: str = "tmp") -> Path:
    """Where a save works until it is committed, or puts away what it replaced."""
    return directory / f".{step_name(step)}.{nonce:016x}.{kind}"


def begin(directory: Path, step: int, nonce: int) -> Path:
    """Make the directory that a save works in.

    Raises: SaveError naming the path.
    """
    path = hidden_path(directory, step, nonce)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except OSError as error:
        reason = f"cannot make the directory: {error.strerror}; give one that this user may write to"
        raise SaveError(reason, rank=0, path=str(path), code=error.errno) from error
    return path


def clean(directory: Path, keep: Path) -> None:
    """Remove what crashed or failed saves left behind; put a step back that was being replaced."""
    for entry in list(directory.iterdir()):
        hidden = _HIDDEN.fullmatch(entry.name)
        if not hidden or entry == keep:
            continue
        step = directory / step_name(int(hidden[1]))
        if hidden[3] == "old" and not step.exists() and (entry / INDEX).is_file():
            os.rename(entry, step)
        else:
            discard(entry)


def discard(path: Path) -> None:
    """Remove a directory; what cannot be removed is reported, and does not stop a save.

    The index goes first: a directory that is half gone when the process dies must not be taken for a step.
    """
    try:
        (path / INDEX).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        log.warning("could not remove %s: %s; remove it by hand", path, error)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put a small file in place whole: written beside, fsynced unless only this run reads it, renamed.

    Raises: SaveError with the bytes wanted and written.
    """
    beside, done = path.with_name(f".{path.name}.part"), 0
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            while done < len(data):
                done += os.write(descriptor, data[done:])
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(beside, path)
    except OSError as error:
        reason = f"cannot write: {error.strerror}; earlier checkpoints are untouched"
        raise SaveError(
            reason, rank=0, path=str(path), wanted=len(data), got=done, code=error.errno
        ) from error


def publish(directory: Path, work: Path, step: int, nonce: int) -> Path:
    """Give the finished directory its name, replacing an earlier save of the step; then move `latest`."""
    final = directory / step_name(step)
    sync_directory(work)
    old = hidden_path(directory, step, nonce, "old")
    if not final.exists():
        os.rename(work, final)
    elif _exchange(work, final):
        os.rename(work, old)
    else:
        os.rename(final, old)
        os.rename(work, final)
    put_file(directory / "latest", f"{step_name(step)}\n".encode())
    sync_directory(directory)
    if old.exists():
        discard(old)
    return final


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one atomic operation, where the system can."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None:
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def retain(directory: Path, keep: int, committed: int, nonce: int) -> None:
    """Keep the `keep` highest steps and the one just committed; the others go."""
    steps = list_steps(directory)
    for step in steps[: max(0, len(steps) - keep)]:
        if step == committed:
            continue
        old = hidden_path(directory, step, nonce, "old")
        try:
            os.rename(directory / step_name(step), old)  # in one go, so that no half step is ever listed
        except OSError as error:
            log.warning("could not remove step %d: %s; remove it by hand", step, error)
            continue
        discard(old)


class Meeting:
    """How the ranks of one save meet, in files of the work directory: manifests, failures, the outcome.

    Collectives belong to the training thread, so the writers' threads may not use them.
    """

    def __init__(self, work: Path, final: Path, rank: int, world: int, timeout_s: float) -> None:
        self._work, self._final, self._rank, self._world = work, final, rank, world
        self._timeout_s = timeout_s

    def hand_in(self, manifest: Mapping[str, Any]) -> None:
        """Say that this rank has written everything it had to."""
        put_file(self._work / f"manifest-{self._rank:05d}.json", json.dumps(manifest).encode(), sync=False)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks; where even that cannot be written, they find out by waiting."""
        described = {"rank": self._rank, "message": f"{type(error).__name__}: {error}", "path": ""}
        if isinstance(error, SaveError):
            described |= {"rank": error.rank, "message": error.reason, "path": error.path}
            described |= {"wanted": error.wanted, "got": error.got, "code": error.errno}
        try:
            put_file(
                self._work / f"failure-{self._rank:05d}.json", json.dumps(described).encode(), sync=False
            )
        except OSError as second:
            log.warning("rank %d could not report its failed save: %s", self._rank, second)

    def collect(self) -> list[dict[str, Any]]:
        """Rank 0: the manifests of all other ranks, in order.

        Raises: SaveError if a rank failed, or said nothing within the timeout.
        """
        names = [f"manifest-{rank:05d}.json" for rank in range(1, self._world)]

        def ready() -> bool:
            return set(names) <= self._names()

        if not self._wait(ready):
            missing = [rank for rank, name in enumerate(names, 1) if name not in self._names()]
            reason = (
                f"ranks {missing} handed in nothing within {self._timeout_s:g} s; "
                "are they alive, and is the directory on a file system that all ranks share?"
            )
            raise SaveError(reason, rank=0, path=str(self._work))
        manifests = [json.loads((self._work / name).read_bytes()) for name in names]
        for name in names:
            (self._work / name).unlink()
        return manifests

    def await_outcome(self) -> None:
        """Other ranks: return once rank 0 has committed.

        Raises: SaveError if any rank failed, or rank 0 did not finish within the timeout.
        """

        def gone() -> bool:
            return not self._work.exists() and self._final.exists()

        if not self._wait(gone):
            reason = f"rank 0 did not commit within {self._timeout_s:g} s"
            raise SaveError(reason, rank=self._rank, path=str(self._work))

    def _names(self) -> set[str]:
        try:
            return set(os.listdir(self._work))
        except FileNotFoundError:
            return set()

    def _wait(self, ready: Any) -> bool:
        start, pause, main = time.monotonic(), 0.001, threading.main_thread()
        while not ready():
            self._raise_failures()
            # When the program has ended, peers that died with it will never come: do not hold up the exit.
            limit = self._timeout_s if main.is_alive() else min(_EXIT_GRACE_S, self._timeout_s)
            if time.monotonic() - start > limit:
                return False
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
        return True

    def _raise_failures(self) -> None:
        for name in sorted(self._names()):
            if name.startswith("failure-"):
                told = json.loads((self._work / name).read_bytes())
                raise SaveError(
                    told["message"],
                    rank=told["rank"],
                    path=told["path"],
                    wanted=told.get("wanted", 0),
                    got=told.get("got", 0),
                    code=told.get("code"),
                )
