"""What graphs saved, by where it is: here, leaving, away, coming back; and in which order it comes back."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ds_offload.activation_piece import Look, Piece, whole
from ds_offload.activation_place import Place, Tier

_SAVED_BY_ONE_NODE = 8  # at most, and more costs only a second reading


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes since the offload was made, and bytes now. A piece is what moves as one: a storage, as a rule."""

    saved_bytes: int  # of pieces that graphs saved
    sent_bytes: int  # of those, began to leave
    fetched_bytes: int  # began to come back; more than sent if a backward runs again
    live_bytes: int  # of pieces that graphs need now
    peak_bytes: int  # the most of `live_bytes`: what it would have taken without
    here_bytes: int  # of `live_bytes`, in the device's memory because of us
    peak_here_bytes: int  # the most of `here_bytes`
    waits: int  # pieces that were not there when they were asked for
    waited_s: float  # by this thread, for them

    def __str__(self) -> str:
        mib = 1 << 20
        return (
            f"activations: {self.saved_bytes / mib:.1f} MiB saved, {self.sent_bytes / mib:.1f} away, "
            f"{self.fetched_bytes / mib:.1f} back; at most {self.peak_here_bytes / mib:.1f} of "
            f"{self.peak_bytes / mib:.1f} MiB here; waited {self.waits} times, {self.waited_s:.3f} s"
        )


class Where(enum.Enum):
    """Where the bytes of a piece are."""

    NEW = "on the device only, among the newest"
    LEAVING = "on the device, and being written to the tier"
    AWAY = "in the tier only"
    BACK = "in the tier, and on the device or on the way there"


@dataclass(slots=True, eq=False)
class _Entry:
    """One piece, for all saved tensors that show it.

    `here` [nbytes] uint8 on the device: the source's own memory while NEW and LEAVING, later what came back.
    `waiting` counts the saved tensors that were not asked for since it came back for the `round`th time.
    """

    piece: Piece
    key: _Key
    storage: StorageWeakRef  # held weakly, so that its address is not another storage's meanwhile
    here: Tensor | None
    where: Where = Where.NEW
    place: Place | None = None
    saved: int = 0
    waiting: int = 0
    passed: int = (
        0  # how many times anything had been asked for when this was first passed over; 0: it was not
    )
    round: int = 0

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes


_Key = tuple[int, int, int, int]


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _key(tensor: Tensor, piece: Piece) -> _Key:
    return (tensor.untyped_storage()._cdata, piece.begin, piece.end, tensor._version)


class _Link:
    """A saved tensor's place in the order in which they were saved, and when it was last asked for."""

    __slots__ = ("after", "asked", "before", "entry", "round")

    def __init__(self, entry: _Entry | None, before: _Link | None) -> None:
        self.entry = entry
        self.round = -1
        self.asked = 0  # how many times anything had been asked for then; 0: it never was
        self.before: _Link = before or self
        self.after: _Link = before.after if before is not None else self
        self.before.after = self.after.before = self

    def take_out(self) -> None:
        self.before.after, self.after.before = self.after, self.before


class Saved:
    """What autograd holds in place of a tensor; when it is gone, no graph needs the tensor any more."""

    __slots__ = ("_shelf", "link", "look", "probe", "version")

    def __init__(self, shelf: Shelf, link: _Link, look: Look, tensor: Tensor) -> None:
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
        self._dead: deque[_Link] = deque()
        self._ghosts: list[Place] = []  # given up, but something is under way there
        self._entries: dict[_Key, _Entry] = {}
        self._order = _Link(None, None)
        self._by: dict[Where, dict[_Entry, None]] = {where: {} for where in Where}
        self._bytes = dict.fromkeys(Where, 0)
        self._closed = False
        self._saved_bytes = self._sent_bytes = self._fetched_bytes = 0
        self._peak_bytes = self._peak_here_bytes = 0
        self._asks, self._waits, self._waited_s = 0, 0, 0.0

    # -- saving --------------------------------------------------------------------------------------------

    def find(self, tensor: Tensor) -> Saved | None:
        """Share the piece that the tensor's storage is saved as, if it is and nobody wrote to it since."""
        with self._held():
            entry = self._entries.get(_key(tensor, whole(tensor)))
            return None if entry is None else self._save(entry, tensor)

    def put(self, tensor: Tensor, piece: Piece) -> Saved:
        """Save a tensor. Raises: OSError without room, or if what was sent before did not get there."""
        with self._held():
            self._check_open()
            key = _key(tensor, piece)
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(piece, key, _weak(tensor), piece.of(tensor))
                self._entries[key] = entry
                self._by[entry.where][entry] = None
                self._bytes[entry.where] += entry.nbytes
                self._saved_bytes += entry.nbytes
            saved = self._save(entry, tensor)  # before anything can fail: its end then buries the entry
            self._push_out()
            return saved

    def _save(self, entry: _Entry, tensor: Tensor) -> Saved:
        entry.saved += 1
        entry.waiting += 1
        link = _Link(entry, self._order.before)
        return Saved(self, link, Look.of(tensor, entry.piece), tensor)

    def _push_out(self) -> None:
        """The oldest of the newest leave until those that stay fit."""
        while self._bytes[Where.NEW] > self._ahead_bytes:
            entry = next(iter(self._by[Where.NEW]))
            assert entry.here is not None
            entry.place = self._tier.send(entry.here)
            self._move(entry, Where.LEAVING)
            self._sent_bytes += entry.nbytes
            self._see_off()
        self._note_peaks()

    def _see_off(self, *, all_of_it: bool = False) -> None:
        """What got to the tier leaves the device; waits while more than `pending_bytes` are on the way."""
        most = 0 if all_of_it else self._pending_bytes
        for wait in (False, True):
            for entry in list(self._by[Where.LEAVING]):
                if wait and self._bytes[Where.LEAVING] <= most:
                    return
                assert entry.place is not None
                if entry.place.left(wait=wait):
                    entry.here = None
                    self._move(entry, Where.AWAY)
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
                self._check_open()
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

    def _start(self, entry: _Entry) -> None:
        assert entry.place is not None
        self._move(entry, Where.BACK)
        entry.passed = 0
        self._fetched_bytes += entry.nbytes
        entry.place.begin()

    def _wait_for(self, entry: _Entry) -> None:
        assert entry.place is not None
        begin, late = time.perf_counter(), not entry.place.arrived()
        entry.here = entry.place.arrive()
        entry.round, entry.waiting = entry.round + 1, entry.saved
        if late:
            self._waits += 1
            self._waited_s += time.perf_counter() - begin

    def _drop_if_served(self, entry: _Entry) -> None:
        if entry.where is Where.BACK and entry.here is not None and not entry.waiting:
            entry.here = None
            self._move(entry, Where.AWAY)

    def _bring_ahead(self, link: _Link) -> None:
        """What was saved before `link` starts to come back, the nearest first, while it fits.

        At most `ahead_bytes` are back, beside the piece asked for if this is the last time. What is there and
        not among the nearest (asked for and needed again much later, or never asked for) goes when its room
        is wanted.
        """
        asked, back = link.entry, self._by[Where.BACK]
        assert asked is not None
        again = asked.waiting > (link.round != asked.round)
        near = self._before(link, self._ahead_bytes - (asked.nbytes if again and asked in back else 0))
        spill = deque(entry for entry in back if entry is not asked and entry not in near)
        total = self._bytes[Where.BACK] - (asked.nbytes if asked in back and not again else 0)
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
        self._note_peaks()

    def _before(self, link: _Link, left: int) -> dict[_Entry, None]:
        """The pieces saved before `link`, the nearest first, up to `left` bytes.

        One node asks for what it saved in the order in which it did, so what was saved soon after `link` and
        is back may be as near.
        """
        near, after = dict[_Entry, None](), link.after
        for _ in range(_SAVED_BY_ONE_NODE):
            if after.entry is None:
                break
            if after.entry is not link.entry and self._soon(after):
                near[after.entry] = None
            after = after.after
        left -= sum(entry.nbytes for entry in near)
        before = link.before
        while (entry := before.entry) is not None:
            just_asked = before.asked and self._asks - before.asked < _SAVED_BY_ONE_NODE
            if entry is not link.entry and entry not in near and not just_asked:
                if entry.nbytes > left:
                    break
                left -= entry.nbytes
                near[entry] = None
            before = before.before
        return near

    def _soon(self, passed: _Link) -> bool:
        """Was it passed a moment ago, and not asked for? A branch that has no gradient never asks."""
        entry = passed.entry
        assert entry is not None
        if entry.where is not Where.BACK or (entry.here is not None and passed.round == entry.round):
            return False
        entry.passed = entry.passed or self._asks
        return self._asks - entry.passed < _SAVED_BY_ONE_NODE

    def _put_off(self, entry: _Entry) -> None:
        assert entry.place is not None
        entry.place.put_off()
        entry.here = None
        self._move(entry, Where.AWAY)

    # -- ends ----------------------------------------------------------------------------------------------

    def let_go(self, link: _Link) -> None:
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
            del self._by[entry.where][entry]
            self._bytes[entry.where] -= entry.nbytes
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
            return Traffic(
                saved_bytes=self._saved_bytes,
                sent_bytes=self._sent_bytes,
                fetched_bytes=self._fetched_bytes,
                live_bytes=sum(self._bytes.values()),
                peak_bytes=self._peak_bytes,
                here_bytes=self._here_bytes(),
                peak_here_bytes=self._peak_here_bytes,
                waits=self._waits,
                waited_s=self._waited_s,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this offload of activations is closed: make another before the forward")

    def _move(self, entry: _Entry, where: Where) -> None:
        del self._by[entry.where][entry]
        self._bytes[entry.where] -= entry.nbytes
        self._by[where][entry] = None
        self._bytes[where] += entry.nbytes
        entry.where = where

    def _here_bytes(self) -> int:
        return sum(self._bytes.values()) - self._bytes[Where.AWAY]

    def _note_peaks(self) -> None:
        self._peak_bytes = max(self._peak_bytes, sum(self._bytes.values()))
        self._peak_here_bytes = max(self._peak_here_bytes, self._here_bytes())


def check_version(tensor: Tensor, version: int, size: torch.Size) -> None:
    """What autograd does itself where no hooks are. Raises: RuntimeError if the tensor was written since."""
    now = tensor._version
    if now != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(size)}] is at version {now}; expected version {version} instead. "
            "torch.autograd.set_detect_anomaly(True) finds the operation"
        )
