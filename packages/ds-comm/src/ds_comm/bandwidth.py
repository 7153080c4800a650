"""What a collective's bytes come to on the wire, by the size of the group that takes part (pure)."""

from __future__ import annotations

OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")


def bus_factor(op: str, world: int) -> float:
    """Bytes that cross each rank's link for one byte of the collective's size, in a group of `world` ranks.

    With it "bus bandwidth" is comparable between operations and group sizes, and to what the link can do.
    Size means: what an all-gather gives, what a reduce-scatter or all-to-all takes, the tensor of an
    all-reduce or broadcast; each counted once. A group of one sends nothing.
    Raises LookupError for another operation.
    """
    if op not in OPS:
        raise LookupError(f"no collective {op!r}; there are {', '.join(OPS)}")
    if world < 1:
        raise ValueError(f"a group of {world} ranks; allowed: 1 or more")
    if world == 1:
        return 0.0
    share = (world - 1) / world
    return {"all_reduce": 2 * share, "broadcast": 1.0}.get(op, share)


def algorithm_bandwidth(num_bytes: float, seconds: float) -> float:
    """Bytes of the collective's size per second; 0 where no time was measured."""
    return num_bytes / seconds if seconds > 0 else 0.0


def bus_bandwidth(op: str, world: int, num_bytes: float, seconds: float) -> float:
    """Bytes per second over each rank's link."""
    return algorithm_bandwidth(num_bytes, seconds) * bus_factor(op, world)
