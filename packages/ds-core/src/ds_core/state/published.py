"""Masters changed: every copy of them that computes is brought up to date, at once or when it is needed."""

from __future__ import annotations

import torch

from ds_core.state.hooks import in_backward
from ds_core.state.reduce import GradReducer
from ds_core.state.store import Store
from ds_core.state.unit import FlatUnit, Whole


class PublishedUnits:
    """What an owner of units does after an update."""

    units: list[FlatUnit]
    trainable: list[FlatUnit]
    reducer: GradReducer
    store: Store
    depth: int  # forwards of the root under way

    def publish(self, *, wait: bool = True, copied: frozenset[str] = frozenset()) -> None:
        """Masters changed: bring everything that is whole up to date.

        `copied`: keys of units whose shard in the parameters' dtype is up to date already (an optimizer that
        writes it in the same pass). Without `wait` the gathers are left under way; the next use waits.
        """
        self.reducer.forget_taken()
        for unit in self.trainable:
            self._publish(unit, copied=unit.key in copied)
        if wait:
            self._arrive()

    def publish_late(self, keys: frozenset[str]) -> None:
        """The shards of these units changed, by an update of an earlier step. Collective."""
        for unit in self.trainable:
            if unit.key in keys:
                self._publish(unit, copied=True)

    def _publish(self, unit: FlatUnit, *, copied: bool) -> None:
        if copied:
            unit.edition += 1
        else:
            unit.refresh_local()
        # Autograd must notice, as it would after a plain optimizer's in-place update.
        torch.autograd.graph.increment_version(unit.params)
        unit.note_versions()
        self.publish_unit(unit)

    def publish_unit(self, unit: FlatUnit) -> None:
        """The unit's `local` changed: bring its whole copy up to date, or forget it. Collective."""
        unit.arrive()

    def settle(self) -> None:
        """Everything that is on its way has arrived; between steps a store's late updates are published, too.

        Collective where updates may come late.
        """
        self.settle_late()
        self._arrive()

    def settle_late(self) -> None:
        """Between steps: a store's late update, if any, is finished and published. Collective then."""
        if self.store.away is not None and self.depth == 0 and not in_backward():
            self.store.away.settle()

    def _arrive(self) -> None:
        for unit in self.units:
            if unit.state is Whole.COMING:
                unit.arrive(unit.ticket)
