"""Looks after the lanes of this process: answers other ranks' questions, and ends waits that are in vain."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ds_core.ground.desync import DesyncError, Report, cannot_go_on, report_of, verdict
from ds_core.ground.flight import Lane, place, user_lines

_POLL_S = 1.0
_GRACE_S = 5.0  # how long ranks have to answer once one asks
_PEERS_ASKED = 8  # a waiting rank looks at so many others at most
_BREAKING_TAG = 0x7FFFFFFF


class Watch:
    """One thread and one key-value store per process; nothing is sent while nobody waits long.

    When a wait fails or runs out of time, or is certain to be in vain, that rank asks all others where they
    are, writes one verdict for everybody and ends every wait of this process. `explain` turns an error of the
    wire into that verdict. The store is the one that the job was started with.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float) -> None:
        self._keep = store  # on its host it is the server
        self._store = store.clone()
        self._rank, self._world, self._timeout_s = rank, world, timeout_s
        self._poll_s = min(_POLL_S, timeout_s / 20)
        self._grace_s = min(_GRACE_S, timeout_s / 4)
        self._by_group: WeakKeyDictionary[ProcessGroup, dict[str, Lane]] = WeakKeyDictionary()
        self._lanes: dict[str, Lane] = {}
        self._main, self._pid = threading.main_thread().ident, os.getpid()
        self._message = ""
        self._lock = threading.Lock()  # the store's client, which both threads use
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ds-watch", daemon=True)
        self._thread.start()

    def lane(self, name: str, group: ProcessGroup) -> Lane:
        """The record of what is sent in a group under this name, made when first asked for.

        Ranks ask for their lanes in the same order, so that "#2" is the same group everywhere.
        """
        known = self._by_group.setdefault(group, {})
        if name not in known:
            again = sum(1 for other in self._lanes if other.partition("#")[0] == name)
            full = f"{name}#{again + 1}" if again else name
            known[name] = self._lanes[full] = Lane(full, dist.get_process_group_ranks(group), self)
        return known[name]

    def check(self) -> None:
        """Raises DesyncError when the verdict is known already."""
        if self._message:
            raise DesyncError(self._message)

    def explain(self, error: Exception) -> None:
        """Raises DesyncError in place of an error of the wire: the verdict that all ranks agree on."""
        if self._leaves.is_set() or os.getpid() != self._pid:
            return  # this process has closed its groups itself, or was forked: they are its parent's
        if not self._message:
            self._judge(str(error))
        raise DesyncError(self._message) from error

    def leave(self) -> None:
        """This process ends: say so, and give those who still wait for it the time to read it."""
        cause = getattr(sys, "last_value", None)
        left = "its script ended"
        if isinstance(cause, BaseException):
            frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
            at = place(user_lines(frames[-1] if frames else None))
            left = f"it raised {type(cause).__name__}: {str(cause)[:300]}" + (f" (at {at})" if at else "")
        with contextlib.suppress(RuntimeError):  # the store's host has gone before
            self._set(f"left/{self._rank}", report_of(self._lanes.values(), "", left).dumps())
            end, pause = time.monotonic() + self._grace_s / 2, 0.001
            while self._rank == 0 and time.monotonic() < end and not self._all_left():
                time.sleep(pause)  # mostly the others are as far as this rank
                pause = min(2 * pause, self._poll_s / 10)
        self._leaves.set()
        self._thread.join(self._poll_s)

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        waited = 0
        try:
            while not self._leaves.wait(self._poll_s) and not self._message:
                if self._has("verdict"):
                    self._take(self._get("verdict"))
                    return
                waited = waited + 1 if any(lane.waiting for lane in self._lanes.values()) else 0
                if self._has("alarm"):
                    self._publish()
                elif waited > 2:
                    self._publish()
                    if cannot_go_on(self._rank, self._peers()):
                        self._judge("")
        except RuntimeError:  # the store is gone with its host; a wait that fails will say so
            return

    def _peers(self) -> dict[int, Report]:
        """What this rank and some others said last."""
        waits = [lane for lane in self._lanes.values() if lane.waiting]
        ranks = {rank for lane in waits for rank in _nearest(lane.ranks, self._rank)}
        return self._read(sorted(ranks | {self._rank}))

    def _read(self, ranks: list[int]) -> dict[int, Report]:
        found = {}
        for rank in ranks:
            key = next((key for key in (f"left/{rank}", f"at/{rank}") if self._has(key)), None)
            if key is not None:
                found[rank] = Report.loads(self._get(key))
        return found

    def _publish(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        where = place(user_lines(frame))
        answers = self._has("alarm")
        self._set(f"at/{self._rank}", report_of(self._lanes.values(), where).dumps())
        if answers:
            self._set(f"answer/{self._rank}", "1")

    def _judge(self, error: str) -> None:
        """Ask everybody, write the verdict unless somebody has, and end this process's waits."""
        try:
            self._set("alarm", "1")
            self._publish()
            end = time.monotonic() + self._grace_s
            while time.monotonic() < end and not self._has("verdict") and not self._all_answered():
                time.sleep(self._poll_s / 10)
            reports = {
                rank: report
                for rank, report in self._read(list(range(self._world))).items()
                if report.left or self._has(f"answer/{rank}")
            }
            text = verdict(self._world, reports, timeout_s=self._timeout_s, error=error)
            with self._lock:
                text = self._store.compare_set("verdict", "", text).decode()
        except RuntimeError:
            mine = report_of(self._lanes.values(), place(user_lines(sys._getframe(1))))
            text = verdict(self._world, {self._rank: mine}, timeout_s=self._timeout_s, error=error)
            text += ". Nobody could be asked: the job's store is gone with its host (rank 0 or the launcher)"
        self._take(text)

    def _take(self, text: str) -> None:
        self._message = text
        for group in list(self._by_group):
            _break(group)

    def _all_answered(self) -> bool:
        return all(self._has(f"answer/{r}") or self._has(f"left/{r}") for r in range(self._world))

    def _all_left(self) -> bool:
        return self._has("verdict") or all(self._has(f"left/{rank}") for rank in range(self._world))

    def _has(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))

    def _get(self, key: str) -> str:
        with self._lock:
            return bytes(self._store.get(key)).decode()

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(key, value)


def _nearest(ranks: tuple[int, ...], me: int) -> list[int]:
    """The others of a group that follow `me`, a bounded number of them."""
    at = ranks.index(me)
    return list((ranks[at + 1 :] + ranks[:at])[:_PEERS_ASKED])


def _break(group: ProcessGroup) -> None:
    """Make whoever waits in this group raise, here and on its other ranks.

    gloo has no abort. But a receive that times out closes the group's connections, and that wakes everybody.
    """
    try:
        if dist.get_backend(group) == "gloo":
            other = (dist.get_rank(group) + 1) % dist.get_world_size(group)
            work = dist.irecv(torch.zeros(1), group=group, group_src=other, tag=_BREAKING_TAG)
            if work is not None:
                work.wait(timedelta(milliseconds=1))
        else:
            group.abort()
    except (RuntimeError, ValueError):  # that is the point; or it is closed already
        return
