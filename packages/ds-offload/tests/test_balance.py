"""Shares by room and speed: checked against every other division that fits."""

from __future__ import annotations

import itertools

import pytest

from ds_offload.balance import READ_BYTES, STATE_BYTES, WRITTEN_BYTES, Balance, Room, plan_tiers
from ds_offload.measure import Bandwidths
from ds_offload.policy import Split, Tiered

NUMEL = 1000
HOST, DEVICE, MIXED = 50.0, 200.0, 600.0  # elements, elements and bytes per second
MEASURED = Bandwidths(host_copy=1.0, host_copy_one=1.0, update=HOST, mixed=MIXED)


def seconds(device: float, host: float, nvme: float) -> float:
    """What the model says of any division."""
    disk = nvme * NUMEL * (READ_BYTES + WRITTEN_BYTES) / MIXED
    return max(device * NUMEL / DEVICE, (host + nvme) * NUMEL / HOST, disk)


@pytest.mark.parametrize("device", [0, 0.1, 0.5, 0.8, 1])
@pytest.mark.parametrize("host", [0, 0.15, 0.2, 1])
def test_no_other_division_that_fits_is_faster(device: float, host: float) -> None:
    total = NUMEL * STATE_BYTES
    found = plan_tiers(NUMEL, Room(device * total, host * total, total), MEASURED, device_update=DEVICE)
    assert found.device + found.host + found.nvme == pytest.approx(1)
    assert found.device <= device + 1e-9
    assert found.host <= host + 1e-9
    assert found.seconds == pytest.approx(seconds(found.device, found.host, found.nvme))
    steps = [number / 20 for number in range(21)]
    others = [
        seconds(d, h, 1 - d - h)
        for d, h in itertools.product(steps, steps)
        if d <= device + 1e-9 and h <= host + 1e-9 and d + h <= 1 + 1e-9
    ]
    assert found.seconds <= min(others) + 1e-9


def test_device_and_host_end_together_where_both_have_room() -> None:
    total = NUMEL * STATE_BYTES
    found = plan_tiers(NUMEL, Room(total, total), MEASURED, device_update=DEVICE)
    assert (found.device, found.host, found.nvme) == pytest.approx((0.8, 0.2, 0))
    assert found.seconds == pytest.approx(0.8 * NUMEL / DEVICE)


def test_without_a_rate_the_device_takes_what_fits() -> None:
    total = NUMEL * STATE_BYTES
    found = plan_tiers(NUMEL, Room(0.25 * total, 0, total), MEASURED)
    assert (found.device, found.host, found.nvme) == pytest.approx((0.25, 0, 0.75))
    assert found.limit == "disk"
    assert found.seconds == pytest.approx(0.75 * NUMEL * 30 / MIXED)
    assert plan_tiers(NUMEL, Room(device=total), MEASURED).seconds == 0.0


def test_a_slow_wire_is_the_limit() -> None:
    slow = Bandwidths(host_copy=1.0, host_copy_one=1.0, update=1e9, to_device=6.0, to_host=3.0)
    found = plan_tiers(NUMEL, Room(0, NUMEL * STATE_BYTES), slow)
    assert (found.limit, found.seconds) == ("wire", pytest.approx(NUMEL * 6 / 3.0))


@pytest.mark.parametrize("shares", [(0.3333, 0.3333, 0.3334), (1.0, 0.0, 0.0), (0.0004, 0.9996, 0.0)])
def test_the_store_takes_what_it_says(shares: tuple[float, float, float]) -> None:
    tiers = Balance(*shares, seconds=1.0, limit="host").tiers()
    policy = Tiered(nvme="/disk", **tiers) if shares[0] < 1 else None
    split = Split.parse(tiers["masters"])
    assert (split.device, split.host, split.nvme) == pytest.approx(shares, abs=0.001)
    assert policy is None or policy.masters == policy.moments == policy.grads


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        ValueError, match="1000 elements have 16000 bytes of state, and there is room for 5000"
    ):
        plan_tiers(NUMEL, Room(5000, 5000, 5000), MEASURED)
    with pytest.raises(ValueError, match="update was not measured"):
        plan_tiers(NUMEL, Room(0, 16000), Bandwidths(1.0, 1.0))
    with pytest.raises(ValueError, match="mixed was not measured"):
        plan_tiers(NUMEL, Room(0, 0, 16000), Bandwidths(1.0, 1.0, update=1.0))
    with pytest.raises(ValueError, match="room on host is -1"):
        Room(host=-1)
    with pytest.raises(ValueError, match="numel=0"):
        plan_tiers(0, Room(), MEASURED)
