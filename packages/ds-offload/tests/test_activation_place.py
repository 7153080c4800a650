"""Places over a lane whose copies happen only when somebody waits: who forgets to wait sees other bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_offload import activation_place
from ds_offload.activation_piece import whole
from ds_offload.activation_place import DiskTier, HostTier, Tier
from ds_offload.activation_shelf import Shelf
from ds_offload.slabs import Slabs
from ds_offload.volume import Volume

SIZE = 8192


class LateCopy:
    def __init__(self, lane: LateLane, target: Tensor, source: Tensor) -> None:
        self._lane, self._target, self._source = lane, target, source

    def _happen(self) -> None:
        queue = self._lane.queue
        while self in queue:  # a stream: in order
            first = queue.pop(0)
            first._target.copy_(first._source)

    def done(self) -> bool:
        return self not in self._lane.queue

    def order(self) -> None:
        self._lane.ordered += 1
        self._happen()

    def block(self) -> None:
        self._happen()


class LateLane:
    """Poisons what it hands out, so that reading too early shows."""

    def __init__(self) -> None:
        self.queue: list[LateCopy] = []
        self.ordered = 0

    def host(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xDD, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> LateCopy:
        self.queue.append(LateCopy(self, target, source))
        return self.queue[-1]


@pytest.fixture
def lane() -> LateLane:
    return LateLane()


@pytest.fixture(params=["host", "disk from a device", "disk"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, lane: LateLane) -> Iterator[Tier]:
    if request.param == "host":
        made: Tier = HostTier(lane)
    else:
        through = None if request.param == "disk" else lane
        made = DiskTier(Volume(tmp_path), through, Slabs(1 << 20), own=True)
    yield made
    made.close()


def source() -> Tensor:
    return torch.randint(0, 200, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def test_there_and_back_and_back_again(tier: Tier) -> None:
    memory = source()
    place = tier.send(memory)
    assert place.left(wait=True)
    memory.fill_(0xCC)  # the allocator gave it to somebody else
    for _ in range(2):
        place.begin()
        place.begin()
        assert torch.equal(place.arrive(), source())
    assert place.release(wait=True)


def test_a_source_may_not_go_before_its_copy_happened(tier: Tier, lane: LateLane) -> None:
    place = tier.send(source())
    if lane.queue:
        assert not place.left(wait=False)
        lane.queue[-1].block()
    assert place.left(wait=True)
    assert torch.equal(place.arrive(), source())


def test_put_off_and_wanted_after_all(tier: Tier) -> None:
    place = tier.send(source())
    place.left(wait=True)
    place.begin()
    place.put_off()
    assert not place.arrived()
    assert torch.equal(place.arrive(), source())
    place.begin()
    assert place.release(wait=True)


def test_memory_that_is_let_go_during_a_copy_is_waited_for(tmp_path: Path) -> None:
    for make in (HostTier, lambda lane: DiskTier(Volume(tmp_path), lane, Slabs(0), own=True)):
        lane = LateLane()
        tier: Tier = make(lane)
        tier.send(source()).release(wait=True)
        assert lane.ordered == 1  # on the way out
        assert not lane.queue
        tier.close()


def test_the_whole_way_of_a_graph(tier: Tier) -> None:
    shelf = Shelf(tier, ahead_bytes=2 * SIZE, pending_bytes=SIZE)
    saved = []
    for value in range(9):
        tensor = torch.full((SIZE // 4,), float(value))
        saved.append(shelf.put(tensor, whole(tensor)))
        shelf._see_off()
    while saved:
        value = len(saved) - 1
        assert bool((shelf.get(saved.pop()) == value).all())
    assert shelf.traffic().live_bytes == 0
    assert shelf.traffic().fetched_bytes >= 6 * SIZE


def test_space_on_disk_is_used_again_and_given_back(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    tier = DiskTier(volume, None, Slabs(0), own=False)
    for _ in range(3):
        places = [tier.send(source()) for _ in range(2)]
        assert all(place.left(wait=True) for place in places)
        assert all(place.release(wait=True) for place in places)
    assert volume.used == 2 * SIZE
    tier.close()
    assert volume.used == 0
    volume.close()


def test_a_full_disk_gives_up_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(tmp_path)
    tier = DiskTier(volume, None, Slabs(0), own=True)
    place = tier.send(source())
    place.left(wait=True)
    place.release(wait=True)
    allocate: Callable[[int], object] = volume.allocate

    def at_most(nbytes: int) -> object:
        if volume.used + nbytes > SIZE:
            raise OSError(28, "full", volume.path)
        return allocate(nbytes)

    monkeypatch.setattr(volume, "allocate", at_most)
    other = tier.send(source()[: SIZE // 2])
    assert other.left(wait=True)
    with pytest.raises(OSError, match="full"):
        tier.send(source())
    assert other.release(wait=True)
    tier.close()


def test_freed_host_memory_goes_back_to_the_system_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lane: LateLane
) -> None:
    returned: list[int] = []
    monkeypatch.setattr(activation_place, "return_freed_memory", lambda accelerator: returned.append(1))
    for through, times in ((None, 2), (lane, 0)):  # a device's memory is not the C library's
        returned.clear()
        tier = DiskTier(Volume(tmp_path), through, Slabs(0), own=True)
        for _ in range(5):
            tier.let_go(64 << 20)
        assert len(returned) == times
        tier.close()
