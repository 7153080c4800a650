"""What comes back when: ahead of its use, nearest first, within the budget. The tier only takes notes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_offload.activation_order import Where
from ds_offload.activation_piece import whole
from ds_offload.activation_shelf import Saved, Shelf

SIZE = 256  # bytes of every tensor here


class NotingPlace:
    """Holds a copy. Out it is done when `told` to be; back it is under way from `begin` to `arrive`."""

    nbytes = SIZE

    def __init__(self, tier: NotingTier, source: Tensor, name: int) -> None:
        self._tier, self._copy, self._name = tier, source.clone(), name

    def left(self, *, wait: bool) -> bool:
        if wait:
            self._tier.notes.append(f"wait for {self._name} to leave")
        return wait or self._tier.quick

    def begin(self) -> None:
        if self._name not in self._tier.coming:
            self._tier.coming.append(self._name)
            self._tier.notes.append(f"begin {self._name}")

    def arrived(self) -> bool:
        return False

    def arrive(self) -> Tensor:
        self._tier.coming.remove(self._name)
        self._tier.notes.append(f"take {self._name}")
        return self._copy.clone()

    def put_off(self) -> None:
        if self._name in self._tier.coming:
            self._tier.coming.remove(self._name)
            self._tier.notes.append(f"put off {self._name}")

    def release(self, *, wait: bool) -> bool:
        self.put_off()
        if wait or self._tier.quick:
            self._tier.released.append(self._name)
        return wait or self._tier.quick


class NotingTier:
    def __init__(self, *, quick: bool = True) -> None:
        self.quick = quick
        self.notes: list[str] = []
        self.coming: list[int] = []
        self.released: list[int] = []
        self.sent = self.freed = 0

    def send(self, source: Tensor) -> NotingPlace:
        self.sent += 1
        return NotingPlace(self, source, int(source.view(torch.float32)[0]))

    def let_go(self, nbytes: int) -> None:
        self.freed += nbytes

    def trim(self) -> None:
        self.notes.append("trim")

    def close(self) -> None:
        self.notes.append("close")


def save(shelf: Shelf, number: int) -> Saved:
    tensor = torch.full((SIZE // 4,), float(number))
    return shelf.put(tensor, whole(tensor))


def ask(shelf: Shelf, saved: Saved) -> int:
    tensor = shelf.get(saved)
    assert len(tensor.unique()) == 1
    return int(tensor[0])


def shelf_over(tier: NotingTier, ahead: int, pending: int = 100) -> Shelf:
    return Shelf(tier, ahead * SIZE, pending * SIZE)


def test_the_newest_stay_and_the_next_are_under_way_before_they_are_asked_for() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=2)
    graph = [save(shelf, n) for n in range(6)]
    assert tier.sent == 4
    assert tier.freed == 4 * SIZE
    assert ask(shelf, graph.pop()) == 5
    assert ask(shelf, graph.pop()) == 4
    assert tier.notes == ["begin 3", "begin 2"]  # while layers 5 and 4 compute
    tier.notes.clear()
    assert ask(shelf, graph.pop()) == 3
    assert tier.notes == ["begin 1", "take 3"]
    assert [ask(shelf, graph.pop()) for _ in range(3)] == [2, 1, 0]
    assert tier.notes == ["begin 1", "take 3", "begin 0", "take 2", "take 1", "take 0"]
    traffic = shelf.traffic()
    assert (traffic.sent_bytes, traffic.fetched_bytes, traffic.waits) == (4 * SIZE, 4 * SIZE, 4)
    assert (traffic.live_bytes, traffic.here_bytes) == (0, 0)
    assert sorted(tier.released) == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_than_the_budget_comes_back(ahead: int) -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead)
    graph = [save(shelf, n) for n in range(10)]
    while graph:
        last = len(graph) - 1
        assert ask(shelf, graph.pop()) == last
        assert len(tier.coming) <= ahead
    assert shelf.traffic().fetched_bytes == (10 - ahead) * SIZE


def test_what_is_saved_twice_comes_once_if_it_is_near() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=2)
    tensor = torch.full((SIZE // 4,), 0.0)
    first, second = shelf.put(tensor, whole(tensor)), shelf.put(tensor, whole(tensor))
    others = [save(shelf, n) for n in (1, 2, 3)]
    assert tier.sent == 2
    assert ask(shelf, second) == ask(shelf, first) == 0
    assert tier.notes.count("take 0") == 1
    assert shelf.traffic().live_bytes == 4 * SIZE
    del first, second, others
    assert shelf.traffic().live_bytes == 0


def test_what_is_needed_again_much_later_makes_room() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=2)
    mask = torch.full((SIZE // 4,), 99.0)
    early = shelf.put(mask, whole(mask))
    layers = [save(shelf, n) for n in range(12)]
    late = shelf.put(mask, whole(mask))
    layers += [save(shelf, n) for n in (20, 21)]
    layers.pop(), layers.pop()
    assert ask(shelf, late) == 99
    while layers:
        last = len(layers) - 1
        assert ask(shelf, layers.pop()) == last
        assert shelf._ledger.bytes[Where.BACK] <= 3 * SIZE
    assert ask(shelf, early) == 99
    assert tier.notes.count("take 99") == 2


def test_what_was_brought_for_nothing_makes_room() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=2)
    old = [save(shelf, n) for n in range(30)]
    assert ask(shelf, old[20]) == 20
    assert tier.coming == [19, 18]
    for number in range(17, 5, -1):  # 19 and 18 are of a branch that has no gradient
        assert ask(shelf, old[number]) == number
        del old[number:18]
    assert tier.coming == [5, 4]
    assert {"put off 19", "put off 18"} <= set(tier.notes)


def test_what_one_node_saved_is_asked_for_in_the_order_of_saving() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=4)
    saved = [save(shelf, n) for n in range(12)]
    for number in (7, 4, 5, 6, 1, 2, 3):  # three tensors for each node
        assert ask(shelf, saved[number]) == number
    assert tier.notes.count("begin 5") == tier.notes.count("begin 6") == 1
    assert not [note for note in tier.notes if note.startswith("put off")]


def test_few_bytes_are_on_the_way_out_at_a_time() -> None:
    tier = NotingTier(quick=False)
    shelf = shelf_over(tier, ahead=1, pending=2)
    graph = [save(shelf, n) for n in range(6)]
    assert tier.notes == [f"wait for {n} to leave" for n in range(3)]
    assert shelf.traffic().here_bytes == 3 * SIZE
    assert ask(shelf, graph[4]) == 4  # still here: no reading
    assert "begin 4" not in tier.notes
    shelf.settle()
    assert shelf.traffic().here_bytes == SIZE + 3 * 0 + shelf._ledger.bytes[Where.BACK]
    assert tier.notes[-1] == "trim"


def test_a_place_is_given_up_once_nothing_is_under_way_there() -> None:
    tier = NotingTier(quick=False)
    shelf = shelf_over(tier, ahead=0)
    graph = [save(shelf, n) for n in range(3)]
    del graph
    assert shelf.traffic().live_bytes == 0
    assert tier.released == []
    shelf.settle()
    assert sorted(tier.released) == [0, 1, 2]


def test_a_tier_that_has_no_room_leaves_the_shelf_as_it_was() -> None:
    tier = NotingTier()
    shelf = shelf_over(tier, ahead=1)
    graph = [save(shelf, 0)]

    def full(source: Tensor) -> NotingPlace:
        raise OSError("full")

    send, tier.send = tier.send, full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        save(shelf, 1)
    tier.send = send  # type: ignore[method-assign]
    assert shelf.traffic().live_bytes == SIZE
    assert ask(shelf, graph[0]) == 0
