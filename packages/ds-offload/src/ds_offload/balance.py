"""Which share of the training state belongs where: by the room there is and by measured speeds (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from ds_offload.measure import Bandwidths

STATE_BYTES = 16  # of an element: master, gradient and two moments in fp32
READ_BYTES, WRITTEN_BYTES = 16, 14  # ... which a disk reads, and writes with a shard in bf16
WIRE_BYTES = 6  # between device and host: a gradient in fp32 one way, a parameter in bf16 the other


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that training state may take of each memory, activations and whole parameters left out."""

    device: float = 0.0
    host: float = 0.0
    nvme: float = 0.0

    def __post_init__(self) -> None:
        for name in ("device", "host", "nvme"):
            if getattr(self, name) < 0:
                raise ValueError(f"room on {name} is {getattr(self, name)} bytes; give 0 or more")


@dataclass(frozen=True, slots=True)
class Balance:
    """Shares of the state, and the seconds that the slowest of device, host, wire and disk takes for them."""

    device: float
    host: float
    nvme: float
    seconds: float
    limit: str  # which of them that is

    def tiers(self) -> dict[str, str]:
        """What `TieredStore` takes: masters, moments and gradients alike."""
        thousandths = {"host": round(1000 * self.host), "nvme": round(1000 * self.nvme)}
        shares = {"device": 1000 - sum(thousandths.values()), **thousandths}
        text = " / ".join(f"{share / 1000:g} {tier}" for tier, share in shares.items() if share)
        return dict.fromkeys(("masters", "moments", "grads"), text)


def plan_tiers(
    numel: int, room: Room, bandwidths: Bandwidths, *, device_update: float | None = None
) -> Balance:
    """Shares of `numel` elements for the shortest update that fits.

    Device and host update at the same time (Twin-Flow), so the device takes what makes both end together, as
    far as there is room: `device_update` and `bandwidths.update` are their elements per second. Without
    `device_update` the device is the host, or costs nothing, and takes what fits. Memory of the host comes
    before the disk, which moves what it holds at every step; the host updates that, too.
    Raises: ValueError when it fits nowhere, or when a rate that is needed was not measured.
    """
    if numel < 1:
        raise ValueError(f"numel={numel}: allowed are whole numbers from 1")
    total = numel * STATE_BYTES
    here, there, disk = (min(1.0, bytes_ / total) for bytes_ in (room.device, room.host, room.nvme))
    least = max(0.0, 1.0 - there - disk)  # that has to stay
    if least > here:
        raise ValueError(
            f"{numel} elements have {total} bytes of state, and there is room for {room.device:.0f} on the "
            f"device, {room.host:.0f} on the host and {room.nvme:.0f} on disk: give more of one"
        )
    costs = _Costs(numel, there, bandwidths, device_update)
    # The longest of linear costs is least at an end, at a kink or where two of them cross.
    candidates = {min(here, max(least, share)) for share in (0.0, 1.0, 1.0 - there, *costs.crossings())}
    device = min(sorted(candidates, reverse=True), key=lambda share: max(costs.of(share).values()))
    parts = costs.of(device)
    limit = max(parts, key=lambda name: parts[name])
    on_disk = max(0.0, 1.0 - device - there)
    return Balance(device, 1.0 - device - on_disk, on_disk, parts[limit], limit)


class _Costs:
    """Seconds of each part of an update, by the share of the state that stays on the device."""

    def __init__(self, numel: int, there: float, bandwidths: Bandwidths, device_update: float | None) -> None:
        self._there, self._bandwidths = there, bandwidths
        self._device = numel / device_update if device_update else 0.0
        self._wire = 0.0
        if bandwidths.to_device is not None:
            slower = min(bandwidths.to_device, bandwidths.to_host or bandwidths.to_device)
            self._wire = numel * WIRE_BYTES / slower
        self._numel = numel

    @property
    def _host(self) -> float:
        return self._numel / _rate(self._bandwidths.update, "update")

    @property
    def _disk(self) -> float:
        return self._numel * (READ_BYTES + WRITTEN_BYTES) / _rate(self._bandwidths.mixed, "mixed")

    def of(self, device: float) -> dict[str, float]:
        away, on_disk = 1.0 - device, max(0.0, 1.0 - device - self._there)
        parts = {"device": device * self._device}
        if away > 0:
            parts |= {"host": away * self._host, "wire": away * self._wire}
        if on_disk > 0:
            parts["disk"] = on_disk * self._disk
        return parts

    def crossings(self) -> list[float]:
        """Shares at which the device's part takes as long as another, or the disk's as long as the host's."""
        found = []
        measured = self._bandwidths
        rates = [self._host if measured.update else 0.0, self._wire]
        found += [rate / (rate + self._device) for rate in rates if rate and self._device]
        if measured.mixed:
            slope, rest = self._disk, 1.0 - self._there
            found += [slope * rest / (slope + self._device)]
            found += [(slope * rest - rate) / (slope - rate) for rate in rates if rate and slope != rate]
        return found


def _rate(value: float | None, name: str) -> float:
    if not value:
        raise ValueError(f"bandwidths.{name} was not measured: give measure_bandwidths what it needs for it")
    return value
