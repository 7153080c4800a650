"""How many bytes of activations are where, and how many went and came."""

from __future__ import annotations

from dataclasses import dataclass

from ds_offload.activation_order import Entry, Where


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


class Ledger:
    """Every piece by where it is, the one that came there first first."""

    def __init__(self) -> None:
        self.by: dict[Where, dict[Entry, None]] = {where: {} for where in Where}
        self.bytes = dict.fromkeys(Where, 0)
        self.waits, self.waited_s = 0, 0.0
        self._saved_bytes = self._sent_bytes = self._fetched_bytes = 0
        self._peak_bytes = self._peak_here_bytes = 0

    def add(self, entry: Entry) -> None:
        """A piece was saved."""
        self.by[entry.where][entry] = None
        self.bytes[entry.where] += entry.nbytes
        self._saved_bytes += entry.nbytes

    def move(self, entry: Entry, where: Where) -> None:
        """It is elsewhere from here on."""
        self.drop(entry)
        entry.where = where
        self.by[where][entry] = None
        self.bytes[where] += entry.nbytes
        self._sent_bytes += entry.nbytes if where is Where.LEAVING else 0
        self._fetched_bytes += entry.nbytes if where is Where.BACK else 0

    def drop(self, entry: Entry) -> None:
        """No graph needs it."""
        del self.by[entry.where][entry]
        self.bytes[entry.where] -= entry.nbytes

    def note_peaks(self) -> None:
        """Remember the most there was; called when nothing is about to go."""
        live = sum(self.bytes.values())
        self._peak_bytes = max(self._peak_bytes, live)
        self._peak_here_bytes = max(self._peak_here_bytes, live - self.bytes[Where.AWAY])

    def traffic(self) -> Traffic:
        """The counts now."""
        live = sum(self.bytes.values())
        return Traffic(
            saved_bytes=self._saved_bytes,
            sent_bytes=self._sent_bytes,
            fetched_bytes=self._fetched_bytes,
            live_bytes=live,
            peak_bytes=self._peak_bytes,
            here_bytes=live - self.bytes[Where.AWAY],
            peak_here_bytes=self._peak_here_bytes,
            waits=self.waits,
            waited_s=self.waited_s,
        )
