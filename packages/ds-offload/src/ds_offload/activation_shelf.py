"""What graphs saved, by where it is: here, leaving, away, coming back; and in which order it comes back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ds_offload.activation_ledger import Ledger, Traffic
from ds_offload.activation_order import Entry, Key, Link, Where, key_of, nearest, weak_storage
from ds_offload.activation_piece import Look, Piece, whole
from ds_offload.activation_place import Place, Tier


class Saved:
    """What autograd holds in place of a tensor; when it is gone, no graph needs the tensor any more."""

    __slots__ = ("_shelf", "link", "look", "probe", "version")

    def __init__(self, shelf: Shelf, link: Link, look: Look, tensor: Tensor) -> None:
        self._shelf, self.link, self.look = shelf, link, look
        self.version = tensor._version
        # The tensor's version counter without its bytes: assigning to `.data` leaves the counter as it is.
        self.probe = tensor.detach()
        self.probe.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def __del__(self) -> None:
        self._shelf.let_go(self.link)


class Shelf:
    """All pieces that graphs need, the newest `ahead_bytes` and the next ones of a backward on the device.

    [Note: the end of a saved tensor] comes from autograd on any thread, or from a garbage collection inside
    any line, ours with the lock taken too. It is noted in a deque, and whoever has the lock next buries it.
    Nothing there may take another lock: the line that was interrupted may hold it.
    """

    def __init__(self, tier: Tier, ahead_bytes: int, pending_bytes: int) -> None:
        self._tier, self._ahead_bytes, self._pending_bytes = tier, ahead_bytes, pending_bytes
        self._lock = threading.Lock()
        self._dead: deque[Link] = deque()
        self._ghosts: list[Place] = []  # given up, but something is under way there
        self._entries: dict[Key, Entry] = {}
        self._order = Link(None, None)
        self._ledger = Ledger()
        self._closed = False
        self._asks = 0

    # -- saving --------------------------------------------------------------------------------------------

    def find(self, tensor: Tensor) -> Saved | None:
        """Share the piece that the tensor's storage is saved as, if it is and nobody wrote to it since."""
        with self._held():
            entry = self._entries.get(key_of(tensor, whole(tensor)))
            return None if entry is None else self._save(entry, tensor)

    def put(self, tensor: Tensor, piece: Piece) -> Saved:
        """Save a tensor. Raises: OSError without room, or if what was sent before did not get there."""
        with self._held():
            _check_open(self._closed)
            key = key_of(tensor, piece)
            entry = self._entries.get(key)
            if entry is None:
                entry = Entry(piece, key, weak_storage(tensor), piece.of(tensor))
                self._entries[key] = entry
                self._ledger.add(entry)
            saved = self._save(entry, tensor)  # before anything can fail: its end then buries the entry
            self._push_out()
            return saved

    def _save(self, entry: Entry, tensor: Tensor) -> Saved:
        entry.saved += 1
        entry.waiting += 1
        link = Link(entry, self._order.before)
        return Saved(self, link, Look.of(tensor, entry.piece), tensor)

    def _push_out(self) -> None:
        """The oldest of the newest leave until those that stay fit."""
        while self._ledger.bytes[Where.NEW] > self._ahead_bytes:
            entry = next(iter(self._ledger.by[Where.NEW]))
            assert entry.here is not None
            entry.place = self._tier.send(entry.here)
            self._ledger.move(entry, Where.LEAVING)
            self._see_off()
        self._ledger.note_peaks()

    def _see_off(self, *, all_of_it: bool = False) -> None:
        """What got to the tier leaves the device; waits while more than `pending_bytes` are on the way."""
        most = 0 if all_of_it else self._pending_bytes
        for wait in (False, True):
            for entry in list(self._ledger.by[Where.LEAVING]):
                if wait and self._ledger.bytes[Where.LEAVING] <= most:
                    return
                assert entry.place is not None
                if entry.place.left(wait=wait):
                    entry.here = None
                    self._ledger.move(entry, Where.AWAY)
                    self._tier.let_go(entry.nbytes)

    # -- asking --------------------------------------------------------------------------------------------

    def get(self, saved: Saved) -> Tensor:
        """The tensor as it was saved; what was saved before it starts to come back.

        Raises: RuntimeError if it was written since, as autograd does; OSError.
        """
        with self._held():
            check_version(saved.probe, saved.version, saved.look.size)
            entry = saved.link.entry
            assert entry is not None
            self._asks += 1
            saved.link.asked = self._asks
            self._see_off()
            if entry.where is Where.AWAY:
                _check_open(self._closed)
                self._start(entry)
            self._bring_ahead(saved.link)
            if entry.here is None:
                self._wait_for(entry)
            assert entry.here is not None
            tensor = saved.look.over(entry.here)
            if saved.link.round != entry.round:
                saved.link.round = entry.round
                entry.waiting -= 1
            self._drop_if_served(entry)
            return tensor

    def _start(self, entry: Entry) -> None:
        assert entry.place is not None
        self._ledger.move(entry, Where.BACK)
        entry.passed = 0
        entry.place.begin()

    def _wait_for(self, entry: Entry) -> None:
        assert entry.place is not None
        begin, late = time.perf_counter(), not entry.place.arrived()
        entry.here = entry.place.arrive()
        entry.round, entry.waiting = entry.round + 1, entry.saved
        if late:
            self._ledger.waits += 1
            self._ledger.waited_s += time.perf_counter() - begin

    def _drop_if_served(self, entry: Entry) -> None:
        if entry.where is Where.BACK and entry.here is not None and not entry.waiting:
            entry.here = None
            self._ledger.move(entry, Where.AWAY)

    def _bring_ahead(self, link: Link) -> None:
        """What was saved before `link` starts to come back, the nearest first, while it fits.

        At most `ahead_bytes` are back, beside the piece asked for if this is the last time. What is there and
        not among the nearest (asked for and needed again much later, or never asked for) goes when its room
        is wanted.
        """
        asked, back = link.entry, self._ledger.by[Where.BACK]
        assert asked is not None
        again = asked.waiting > (link.round != asked.round)
        left = self._ahead_bytes - (asked.nbytes if again and asked in back else 0)
        near = nearest(link, left, self._asks)
        spill = deque(entry for entry in back if entry is not asked and entry not in near)
        total = self._ledger.bytes[Where.BACK] - (asked.nbytes if asked in back and not again else 0)
        for entry in near:
            if entry.where is Where.BACK and entry.here is None:
                assert entry.place is not None
                entry.place.begin()  # its next step, if it has one
            more = entry.nbytes if entry.where is Where.AWAY else 0
            while total + more > self._ahead_bytes and spill:
                total -= spill[0].nbytes
                self._put_off(spill.popleft())
            if total + more > self._ahead_bytes or self._closed:
                break
            if more:
                self._start(entry)
                total += more
        while total > self._ahead_bytes and spill:
            total -= spill[0].nbytes
            self._put_off(spill.popleft())
        self._ledger.note_peaks()

    def _put_off(self, entry: Entry) -> None:
        assert entry.place is not None
        entry.place.put_off()
        entry.here = None
        self._ledger.move(entry, Where.AWAY)

    # -- ends ----------------------------------------------------------------------------------------------

    def let_go(self, link: Link) -> None:
        """A saved tensor is gone. See [Note: the end of a saved tensor]."""
        self._dead.append(link)
        self._tidy()

    def _tidy(self) -> None:
        while self._dead and self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            link = self._dead.popleft()
            link.take_out()
            entry = link.entry
            assert entry is not None
            entry.saved -= 1
            entry.waiting -= link.round != entry.round
            if entry.saved:
                self._drop_if_served(entry)
                continue
            del self._entries[entry.key]
            self._ledger.drop(entry)
            if entry.place is not None:
                self._ghosts.append(entry.place)
        self._lay_ghosts()

    def _lay_ghosts(self, *, wait: bool = False) -> None:
        if not self._closed:
            self._ghosts = [place for place in self._ghosts if not place.release(wait=wait)]

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._lock:
            self._bury()
            yield
        self._tidy()

    # -- the whole -----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything that was sent is there; what is kept for the next graph goes. Raises: OSError."""
        with self._held():
            self._see_off(all_of_it=True)
            self._lay_ghosts(wait=True)
            self._tier.trim()

    def close(self) -> None:
        """Give the tier up; what is away is lost. Again is harmless."""
        with self._held():
            if not self._closed:
                self._lay_ghosts(wait=True)
                self._closed = True
                self._tier.close()

    def traffic(self) -> Traffic:
        """The counts, with what is under way in them."""
        with self._held():
            return self._ledger.traffic()


def _check_open(closed: bool) -> None:
    if closed:
        raise RuntimeError("this offload of activations is closed: make another before the forward")


def check_version(tensor: Tensor, version: int, size: torch.Size | None = None) -> None:
    """What autograd does itself where no hooks are. Raises: RuntimeError if the tensor was written since."""
    now = tensor._version
    if now != version:
        size = tensor.shape if size is None else size
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(size)}] is at version {now}; expected version {version} instead. "
            "torch.autograd.set_detect_anomaly(True) finds the operation"
        )
