"""A store of tensors in several places: bytes by tier, keys, what goes with what, norms that are true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import ReplicatedOwner
from ds_core.state.unit import FlatUnit
from ds_offload import Tiered, TieredStore

NVME = dict.fromkeys(("params", "grads", "masters", "moments"), "nvme")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TieredStore]:
    made = TieredStore(nvme=str(tmp_path), **NVME)
    yield made
    made.close()


def unit_of(store: TieredStore) -> FlatUnit:
    """The one unit of a small model on this store."""
    model = nn.Linear(30, 20)
    owner = ReplicatedOwner(model, store=store)
    unit_of.kept = owner  # type: ignore[attr-defined]
    return owner.units[0]


def reduced(unit: FlatUnit, seed: int) -> Tensor:
    return torch.randn(unit.layout.shard_numel, generator=torch.Generator().manual_seed(seed))


def test_a_policy_or_its_settings_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"give a Tiered or settings, not both; got a Tiered and \['depth'\]"
    ):
        TieredStore(Tiered(), depth=2)
    assert TieredStore().features == {"offload"}
    on_device = TieredStore(grads="device", masters="device", moments="device")
    assert (on_device.features, on_device.volume) == (frozenset(), None)


@pytest.mark.parametrize(
    ("masters", "device", "host", "nvme"),
    [
        ("nvme", 0, 0, 40_000),
        ("host", 0, 40_000, 0),
        ("device", 40_000, 0, 0),
        ("0.5 host / 0.5 nvme", 0, 4096 * 4, 40_000 - 4096 * 4),
    ],
)
def test_bytes_are_counted_by_tier(masters: str, device: int, host: int, nvme: int, tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), masters=masters, moments=masters)
    values = torch.randn(10_000)
    home = store.create("unit/master", values)
    assert torch.equal(home, values)
    assert (home is values) == (masters == "device")
    assert store.bytes_by_tier() == {"device": device, "host": host, "nvme": nvme}
    assert store.home("unit/master") is home
    store.drop("unit/master")
    assert store.bytes_by_tier() == {"device": 0, "host": 0, "nvme": 0}
    store.close()


def test_a_key_is_taken_until_it_is_dropped(store: TieredStore) -> None:
    store.create("unit/master", torch.ones(10))
    with pytest.raises(ValueError, match="the store already holds 'unit/master'; one store serves one model"):
        store.create("unit/master", torch.ones(10))
    store.drop("unit/master")
    assert store.create("unit/master", torch.zeros(5)).tolist() == [0.0] * 5
    with pytest.raises(KeyError):
        store.home("other/master")


def test_gradients_and_states_go_with_their_unit_and_its_shard_stays(store: TieredStore) -> None:
    cpu = torch.device("cpu")
    for unit in ("one", "two"):
        store.create(f"{unit}/master", torch.ones(10))
        store.create(f"{unit}/param", torch.ones(10))
        for name in ("grad", "exp_avg"):
            store.make_home(f"{unit}/{name}", 10, torch.float32, cpu)
    assert store.volume is not None
    store.drop("one/master")
    assert set(store._homes) == {"one/param", "two/master", "two/param", "two/grad", "two/exp_avg"}
    store.drop("one/param")
    store.drop("two/master")
    store.drop("two/param")
    assert (store.bytes_by_tier()["nvme"], store.volume.used) == (0, 0)


def test_what_stays_on_the_device_stays_whole_and_is_asked_once(tmp_path: Path) -> None:
    share = "0.5 device / 0.5 host"
    store = TieredStore(masters=share, moments=share, grads="host")
    where = [store.stays(f"{unit}/master", 100) for unit in range(10)]
    assert sum(where) == 5
    assert [store.stays(f"{unit}/exp_avg", 100) for unit in range(10)] == where  # with their masters
    assert not any(store.stays(f"{unit}/grad", 100) for unit in range(10))


def test_a_fetch_where_a_copy_is_not_as_good(tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), params="0.5 host / 0.5 nvme", masters="host")
    values = torch.randn(10_000)
    store.create("unit/param", values)
    store.create("unit/master", values)
    out = torch.zeros(10_000)
    assert store.fetch("unit/master", out) is None
    assert store.fetch("stranger/param", out) is None
    ticket = store.fetch("unit/param", out)
    assert ticket is not None
    ticket.wait()
    assert torch.equal(out, values)
    assert store.apart("param")
    assert store.paged("unit/param") is not None
    assert store.paged("unit/master") is None
    store.close()


def test_a_norm_is_noted_and_forgotten_when_the_gradient_is_written(store: TieredStore) -> None:
    unit = unit_of(store)

    def keep(seed: int) -> None:
        unit.gradient = None
        room = store.room(unit)
        assert room is not None
        store.keep(unit, room.copy_(reduced(unit, seed)), final=False)
        store.settle()

    def noted() -> bool:
        """Is the norm the noted one, and in any case the true one?"""
        assert unit.gradient is not None
        norm = store.norm_of(unit)
        assert float(norm) == float(unit.gradient.norm())
        return norm is store._norms[unit.key][0]

    keep(0)
    assert noted()
    writes: list[Any] = [
        lambda g: g.mul_(2),
        lambda g: g[3:9].zero_(),
        lambda g: g.view(31, 20)[5].add_(1.0) if g.numel() == 620 else g[:20].add_(1.0),
        lambda g: g.detach().clamp_(max=0.5),
        lambda g: torch._foreach_mul_([g[:100], g[100:]], 0.5),
        lambda g: g.copy_(torch.ones_like(g)),
    ]
    for number, write in enumerate(writes):
        keep(number)
        assert noted()
        write(unit.gradient)
        assert not noted(), f"write {number}"
    keep(7)
    unit.gradient = torch.full((unit.layout.shard_numel,), 2.0)  # another tensor altogether
    assert not noted()


def test_gradients_add_up_where_they_are(store: TieredStore) -> None:
    unit = unit_of(store)
    total = torch.zeros(unit.layout.shard_numel)
    for seed in range(3):
        room = store.room(unit)
        assert room is not None
        if seed:
            assert torch.equal(room, total)
            room += reduced(unit, seed)
        else:
            room.copy_(reduced(unit, seed))
        total += reduced(unit, seed)
        store.keep(unit, room, final=False)
    store.settle()
    assert unit.gradient is not None
    assert torch.equal(unit.gradient, total)
    unit.gradient = by_hand = torch.ones(unit.layout.shard_numel)
    room = store.room(unit)
    assert room is not None
    assert torch.equal(room, by_hand)
    assert room.data_ptr() != by_hand.data_ptr()


def test_close_ends_the_file_and_the_engine(tmp_path: Path) -> None:
    store = TieredStore(nvme=str(tmp_path), **NVME)
    store.create("unit/master", torch.ones(10))
    store.close()
    store.close()
    with pytest.raises(OSError, match="wanted 4096 bytes of a volume that is closed"):
        store.create("other/master", torch.ones(10))
