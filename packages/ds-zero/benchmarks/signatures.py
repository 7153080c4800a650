"""What signing every collective costs: steps with and without it, A B B A, and the time inside by itself.

`ds launch --nproc 2 signatures.py --size 30m`. Rank 0 prints JSON. Without signatures messages still carry a
number, since they need one.
"""

from __future__ import annotations

from typing import Any

import torch
from pairs import compare

from ds_core.ground.flight import Flight, Lane


def without(lane: Lane, op: str, tensor: torch.Tensor, about: str = "") -> Flight:
    lane.number += 1
    return Flight(lane.number, "", tensor.dtype, 0, "", 0, lane.number, ())


def put(record: Any) -> None:
    Lane.record = record  # type: ignore[method-assign]


if __name__ == "__main__":
    compare("collectives", Lane.record, without, put)
