"""Training on uneven data: ranks that have run out go on beside the others without counting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ds_core.state.owner import owner_of

Batch = TypeVar("Batch")
_NOTHING: Any = object()


class join(Generic[Batch]):
    """`for batch in join(model, batches)`: as many rounds on every rank as the longest rank has batches.

    A rank that has run out is given its last batch again (or `filler`), so that it takes part in every
    collective, and its gradients count nothing: each backward inside a round adds the mean over the ranks
    that had a batch. `active` says whether this rank's batch counts; leave the others out of your own sums.
    With `weigh=False` gradients are left as they are, for loops that weigh them by tokens
    (`engine.backward(loss, tokens=n if batches.active else 0)`).

    Collective: one small all-reduce before each round. Raises LookupError when no parameter of `model` is
    sharded, ValueError on all ranks when one has no batch at all and no filler.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], *, filler: Batch = _NOTHING, weigh: bool = True
    ) -> None:
        self.active = True
        self._batches, self._last, self._weigh = batches, filler, weigh
        self._owners = list({id(owner): owner for owner in map(owner_of, model.parameters())}.values())

    def __iter__(self) -> Iterator[Batch]:
        control = self._owners[0].control
        batches = iter(self._batches)
        try:
            while True:
                batch = next(batches, _NOTHING)
                self.active = batch is not _NOTHING
                self._last = batch if self.active else self._last
                counts = torch.tensor([float(self.active), float(self._last is _NOTHING)])
                control.all_reduce(counts, about="who still has a batch").wait()
                having, lacking = counts.tolist()
                if having == 0:
                    return
                if lacking:
                    raise ValueError(
                        f"{lacking:.0f} of {control.world} ranks have no batch at all, and nothing to run in "
                        "its place: give every rank one, or join(..., filler=a batch of the right shape)"
                    )
                if self._weigh:
                    self._count(control.world / having if self.active else 0.0)
                yield self._last
        finally:
            self._count(1.0)

    def _count(self, share: float) -> None:
        for owner in self._owners:
            owner.reducer.share = share
