"""The updates that run on one store: made for its optimizers, and told what the store learns."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol, cast

from ds_core.state.store import HasGradient
from ds_core.state.unit import FlatUnit
from ds_core.train.optim import ShardedOptimizer
from ds_offload.policy import Tiered
from ds_offload.step import ChunkedUpdate
from ds_offload.zen_update import ZenFlowUpdate
from ds_offload.zen_view import FlowStore


class Update(Protocol):
    """What a store tells an update."""

    def begin(self, unit: FlatUnit) -> None:
        """The unit's gradient is in its home, probably for good."""
        ...

    def settle(self) -> None:
        """Nothing of an earlier step is still to come. Collective where something was."""
        ...

    def close(self) -> None:
        """Workers end."""
        ...


class UpdatingStore:
    """The part of a store that looks after updates. An update goes with its optimizer."""

    policy: Tiered

    def __init__(self) -> None:
        self._steps: list[weakref.ref[Update]] = []

    def steps(self, optimizer: Any) -> ChunkedUpdate | ZenFlowUpdate:
        """The update of what is not on the device."""
        store, sharded = cast(FlowStore, self), cast(ShardedOptimizer, optimizer)
        made: ChunkedUpdate | ZenFlowUpdate
        if self.policy.zenflow is not None:
            made = ZenFlowUpdate(store, sharded, self.policy.zenflow)
        else:
            made = ChunkedUpdate(store, sharded)
        self._steps.append(weakref.ref(made))
        return made

    def foresee(self, unit: HasGradient) -> None:
        """Updates that run ahead of the step may begin."""
        for update in self.updates():
            update.begin(cast(FlatUnit, unit))

    def updates(self) -> Iterator[Update]:
        """Those whose optimizers are still there."""
        for found in list(self._steps):
            if (update := found()) is not None:
                yield update
