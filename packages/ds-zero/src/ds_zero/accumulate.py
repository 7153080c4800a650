"""Accumulating gradients without reducing them, in a plain loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ds_core.state.owner import owner_of


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backwards that begin inside keep their gradients whole on this rank, in the accumulation dtype.

    The next backward outside, or the step, reduces the sum: one reduction for several micro batches, at the
    price of whole gradients in between. Legal at every stage; every rank does it for the same backwards.
    Raises LookupError when no parameter of `model` is sharded.
    """
    owners = list({id(owner): owner for owner in map(owner_of, model.parameters())}.values())
    before = [owner.reducer.hold for owner in owners]
    for owner in owners:
        owner.reducer.hold = True
    try:
        yield
    finally:
        for owner, held in zip(owners, before, strict=True):
            owner.reducer.hold = held
