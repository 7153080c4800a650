"""CheckpointStore: named parts in, step directories out, at any world size, in the background if asked."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch.distributed import ProcessGroup

from ds_core.state import checkpoint_commit as commit
from ds_core.state.checkpoint_index import entry_name
from ds_core.state.checkpoint_job import Owned, SaveHandle, SaveJob
from ds_core.state.checkpoint_peers import Peers
from ds_core.state.checkpoint_plan import Collected, WritePlan, collect, parse_held, plan_writes
from ds_core.state.checkpoint_reader import load_parts
from ds_core.state.checkpoint_staging import Snapshot, Staging
from ds_core.state.shard import AnnouncesChange, FlatShard, Json, Saveable


class CheckpointStore:
    """Checkpoints of one run in one directory, on a file system that all ranks share.

    `keep` limits how many steps stay (None: all): the highest ones, and the one just saved. Saving a step
    that exists replaces it. A directory belongs to one run at a time.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int | None = None,
        *,
        group: ProcessGroup | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: give at least 1, or None to keep every step")
        self._directory, self._keep = Path(directory).absolute(), keep
        self._group, self._timeout_s = group, timeout_s
        self._staging = Staging()
        self._running: SaveHandle | None = None
        self._planned: tuple[str, WritePlan] | None = None

    def save(
        self, step: int, parts: Mapping[str, Saveable], user: Json = None, block: bool = True
    ) -> SaveHandle:
        """Write every part's state as one step; without `block`, return while a thread still writes.

        `user` is any JSON value; rank 0's is kept. A save waits for the one before it. Without `block`,
        parts with `before_next_change` are copied in the background, the others before this returns.
        Collective: all ranks call it with the same step.
        Raises: ValueError before anything is written; SaveError, also that of an earlier save.
        """
        peers = Peers(self._group, self._timeout_s)
        nonce, mine, error = secrets.randbits(63), None, None
        try:
            self.wait()
            mine = collect(parts, user)
            if peers.rank == 0:
                commit.begin(self._directory, step, nonce)
        except Exception as caught:
            error = caught
        text = mine.describe() if mine is not None else ""
        digest = hashlib.sha256(text.encode()).digest()
        halves = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
        rows = peers.agree([step, nonce, *halves], error, f"saving step {step}", entering=True)
        if len({row[0] for row in rows}) > 1:
            raise ValueError(f"ranks save different steps, by rank: {[row[0] for row in rows]}")
        assert mine is not None
        plan = self._plan(peers, text, json.dumps([row[2:] for row in rows]))
        job = SaveJob(
            directory=self._directory,
            step=step,
            nonce=rows[0][1],
            rank=peers.rank,
            world=peers.world,
            owned=list(_owned(mine, plan, peers.rank)),
            values=mine.values,
            plan=plan,
            keep=self._keep,
            timeout_s=self._timeout_s,
        )
        handle = self._start(job, None if block else parts)
        if block:
            # All ranks or none: nobody goes on, or deletes, or loads, before rank 0 has moved `latest`.
            peers.agree([], handle.exception(), f"saving step {step}")
        return handle

    def _start(self, job: SaveJob, changing: Mapping[str, Saveable] | None) -> SaveHandle:
        """Run the job in its thread; `changing` are the parts to snapshot when nobody waits for it."""
        handle = SaveHandle(self._directory / commit.step_name(job.step))
        if changing is None:
            for device in {owned.memory.device for owned in job.owned}:
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
        else:
            job = self._snapshot(job, changing)
        # Not a daemon: a program that ends while it runs waits for the commit.
        thread = threading.Thread(
            target=job.run, args=(handle,), name=f"ds-checkpoint-{job.step}", daemon=False
        )
        thread.start()
        self._running = handle
        return handle

    def _snapshot(self, job: SaveJob, parts: Mapping[str, Saveable]) -> SaveJob:
        # See [Note: what may still change]
        steady = {name: part for name, part in parts.items() if isinstance(part, AnnouncesChange)}
        held, staged = _held_and_staged(job.owned, parts)
        sources = [owned.memory for owned in staged]
        copies = self._staging.views(sources)
        snapshot = Snapshot(sources, copies, [owned.part in steady for owned in staged], held=bool(held))
        for part in steady.values():
            part.before_next_change(snapshot.wait_late)
        snapshot.copy_now()
        for owned, copy in zip(staged, copies, strict=True):
            held.append(replace(owned, memory=copy, let_go=None))
        return replace(job, owned=held, snapshot=snapshot)

    def _plan(self, peers: Peers, text: str, key: str) -> WritePlan:
        """Who writes what; shapes rarely change, so it is nearly always the last plan."""
        if self._planned is None or self._planned[0] != key:
            held = [parse_held(each) for each in peers.gather_text(text)]
            self._planned = (key, plan_writes(held))
        return self._planned[1]

    def load(
        self, parts: Mapping[str, Saveable], step: int | Literal["latest"] = "latest", verify: bool = False
    ) -> Json:
        """Read a step into the memory that the parts name, at any world size; returns the user state.

        Sizes and the quick sum of every file that is needed are always checked, sha256 with `verify`, all
        before any memory is written. Extra host memory: a few buffers of 4 MiB.
        Collective: all ranks call it alike; an error on one is raised on all.
        Raises: LookupError if there is no such step or part, DamagedCheckpoint, ValueError from a part.
        """
        self.wait()
        peers, error, chosen = Peers(self._group, self._timeout_s), None, -1
        try:
            chosen = self._choose(step)
        except Exception as caught:
            error = caught
        chosen = peers.agree([chosen], error, "loading", entering=True)[0][0]
        return load_parts(self.path(chosen), parts, peers, strong=verify)

    def _choose(self, step: int | Literal["latest"]) -> int:
        found = self.latest() if step == "latest" else step if step in self.steps() else None
        if found is None:
            listed = ", ".join(map(str, self.steps())) or "none"
            raise LookupError(
                f"no complete checkpoint for step {step!r} in {self._directory}; steps there: {listed}"
            )
        return found

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        return commit.list_steps(self._directory)

    def latest(self) -> int | None:
        """The step committed last, None if there is none."""
        return commit.latest_step(self._directory)

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self._directory / commit.step_name(step)

    def reserve(self, parts: Mapping[str, Saveable]) -> None:
        """Page in the memory that saves without `block` copy to, for the first to be as quick as the rest.

        Collective: all ranks call it.
        """
        peers = Peers(self._group, self._timeout_s)
        mine = collect(parts, None)
        held = [parse_held(each) for each in peers.gather_text(mine.describe())]
        owned = list(_owned(mine, plan_writes(held), peers.rank))
        self._staging.reserve([each.memory for each in _held_and_staged(owned, parts)[1]])

    def wait(self) -> None:
        """Wait for the save in the background.

        Raises: SaveError if it failed and nobody has been told.
        """
        running, self._running = self._running, None
        if running is not None:
            running.settle()

    def close(self) -> None:
        """Wait, and give the snapshot's memory back.

        Raises: SaveError if the last save failed and nobody has been told.
        """
        self.wait()
        self._staging.release()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _owned(mine: Collected, plan: WritePlan, rank: int) -> Iterator[Owned]:
    """The boxes that `rank` writes, with their memory."""
    for write in plan.writes[rank]:
        held, memory = mine.held[write.held], mine.memory[write.held]
        flat = memory[write.start - held.start : write.end - held.start]
        for box, view in FlatShard(flat, torch.Size(held.shape), write.start).boxes():
            key = entry_name(held.part, held.name, box, held.shape)
            yield Owned(held.part, held.name, box, key, view.reshape(-1), mine.let_go[write.held])


def _held_and_staged(
    owned: Sequence[Owned], parts: Mapping[str, Saveable]
) -> tuple[list[Owned], list[Owned]]:
    """What a file holds already is written from there, if it stays as it is meanwhile; the rest is copied."""
    held, staged = list[Owned](), list[Owned]()
    for each in owned:
        stays = each.let_go is not None and isinstance(parts[each.part], AnnouncesChange)
        (held if stays else staged).append(each)
    return held, staged
