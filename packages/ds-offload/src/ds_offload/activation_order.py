"""The order in which tensors were saved, and which of them a backward will ask for next."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ds_offload.activation_piece import Piece
from ds_offload.activation_place import Place

_SAVED_BY_ONE_NODE = 8  # at most, and more costs only a second reading

Key = tuple[int, int, int, int]


class Where(enum.Enum):
    """Where the bytes of a piece are."""

    NEW = "on the device only, among the newest"
    LEAVING = "on the device, and being written to the tier"
    AWAY = "in the tier only"
    BACK = "in the tier, and on the device or on the way there"


@dataclass(slots=True, eq=False)
class Entry:
    """One piece, for all saved tensors that show it.

    `here` [nbytes] uint8 on the device: the source's own memory while NEW and LEAVING, later what came back.
    `waiting` counts the saved tensors that were not asked for since it came back for the `round`th time.
    """

    piece: Piece
    key: Key
    storage: StorageWeakRef  # held weakly, so that its address is not another storage's meanwhile
    here: Tensor | None
    where: Where = Where.NEW
    place: Place | None = None
    saved: int = 0
    waiting: int = 0
    passed: int = 0  # how many asks there had been when it was passed over without one; 0: it was not
    round: int = 0

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    """Keeps the storage's address, not its bytes."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def key_of(tensor: Tensor, piece: Piece) -> Key:
    """The same for the same bytes only: while an entry holds the storage weakly, and until a write."""
    return (tensor.untyped_storage()._cdata, piece.begin, piece.end, tensor._version)


class Link:
    """A saved tensor's place in the order in which they were saved, and when it was last asked for."""

    __slots__ = ("after", "asked", "before", "entry", "round")

    def __init__(self, entry: Entry | None, before: Link | None) -> None:
        self.entry = entry
        self.round = -1
        self.asked = 0  # how many times anything had been asked for then; 0: it never was
        self.before: Link = before or self
        self.after: Link = before.after if before is not None else self
        self.before.after = self.after.before = self

    def take_out(self) -> None:
        self.before.after, self.after.before = self.after, self.before


def nearest(link: Link, left: int, asks: int) -> dict[Entry, None]:
    """The pieces saved before `link`, the nearest first, up to `left` bytes; `asks` is how many there were.

    One node asks for what it saved in the order in which it did, so what was saved soon after `link` and
    is back may be as near.
    """
    near, after = dict[Entry, None](), link.after
    for _ in range(_SAVED_BY_ONE_NODE):
        if after.entry is None:
            break
        if after.entry is not link.entry and _soon(after, asks):
            near[after.entry] = None
        after = after.after
    left -= sum(entry.nbytes for entry in near)
    before = link.before
    while (entry := before.entry) is not None:
        just_asked = before.asked and asks - before.asked < _SAVED_BY_ONE_NODE
        if entry is not link.entry and entry not in near and not just_asked:
            if entry.nbytes > left:
                break
            left -= entry.nbytes
            near[entry] = None
        before = before.before
    return near


def _soon(passed: Link, asks: int) -> bool:
    """Was it passed a moment ago, and not asked for? A branch that has no gradient never asks."""
    entry = passed.entry
    assert entry is not None
    if entry.where is not Where.BACK or (entry.here is not None and passed.round == entry.round):
        return False
    entry.passed = entry.passed or asks
    return asks - entry.passed < _SAVED_BY_ONE_NODE
