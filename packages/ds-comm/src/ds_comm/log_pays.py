"""Does compression pay? What coded collectives took, against the same bytes sent plain (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_comm.bandwidth import bus_factor
from ds_comm.log_rows import num_bytes
from ds_comm.log_tally import Tally

ENOUGH = 10  # coded calls before anything is said


@dataclass(frozen=True, slots=True)
class Verdict:
    """Seconds per call with the codec (encoding, wire and decoding) and without it."""

    axis: str
    codec: str
    calls: int
    logical_bytes: float  # of a call
    coded_s: float
    coding_s: float  # of these, encoding and decoding
    plain_s: float
    bandwidth: float  # bytes per second over a link, plain

    @property
    def pays(self) -> bool:
        return self.coded_s <= self.plain_s

    def __str__(self) -> str:
        end = "compression pays" if self.pays else "compression does not pay here, send plain"
        return (
            f"{self.axis}: {self.codec} took {1e3 * self.coded_s:.3f} ms a call ({1e3 * self.coding_s:.3f} of"
            f" them encoding and decoding), the same {num_bytes(self.logical_bytes)} plain would take"
            f" {1e3 * self.plain_s:.3f} ms at the {self.bandwidth / 1e9:.3f} GB/s of this axis: {end}"
        )


def plan_verdicts(tally: Tally, plain_bandwidth: Mapping[str, float]) -> list[Verdict]:
    """One for each axis and codec of which enough was seen.

    `plain_bandwidth`: bytes per second over a link, by axis, where it was measured apart; else it is that of
    plain collectives along the axis in the size class of the smallest coded one and above. Without either
    there is no verdict, nor where no coded collective was ever waited for: then its time is nobody's loss.
    """
    found = []
    for axis, codec in sorted({(kind.axis, kind.codec) for kind in tally.sums if kind.codec}):
        sums = {kind: one for kind, one in tally.sums.items() if (kind.axis, kind.codec) == (axis, codec)}
        calls = sum(one.calls for one in sums.values())
        least = min(one.smallest for one in sums.values())
        bandwidth = plain_bandwidth.get(axis) or tally.plain_bus_bandwidth(axis, least)
        if calls < ENOUGH or not bandwidth or any(one.exact.count == 0 for one in sums.values()):
            continue
        wire = sum(one.exact.total / one.exact.count * one.calls for one in sums.values())
        coding = sum(tally.coding[axis, codec].values())
        carried = sum(one.logical_bytes * bus_factor(kind.op, kind.world) for kind, one in sums.items())
        logical = sum(one.logical_bytes for one in sums.values())
        seconds = (wire + coding) / calls, coding / calls, carried / bandwidth / calls
        found.append(Verdict(axis, codec, calls, logical / calls, *seconds, bandwidth))
    return found
