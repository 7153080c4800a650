"""How an owner's gradients and parameters travel, where a codec over one group does not say it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.state.shard import Saveable
from ds_core.state.unit import FlatUnit


class Route(Saveable, Protocol):
    """What several hops, or memory of what rounding has lost, need besides a codec.

    Its state (of `Saveable`) is training state: checkpoints hold it beside the optimizer's, under "wire/";
    names and shapes are the route's own. From a checkpoint of a run without it a route gets no names.
    """

    def connect(self, owner: Any) -> None:
        """The owner (a FlatOwner) has these units, for the first time or cut anew.

        Collective over `owner.mesh`: makes the groups that the route needs, and compares its settings
        between ranks. Raises ValueError for an owner that it cannot serve.
        """
        ...


@runtime_checkable
class GradientRoute(Route, Protocol):
    """From each rank's own gradients to the reduced ones."""

    @property
    def whole_grads(self) -> bool:
        """Must gradients stay whole on every rank until the last micro batch of a step? Read each round."""
        ...

    def reduce(
        self, unit: FlatUnit, out: Tensor, full: Tensor, *, scale: float, accumulate: bool
    ) -> Ticket | None:
        """[shard_numel] <- [numel]: this rank's part of `scale` times the sum over the ranks that cut `unit`.

        `full` holds zeros where nothing came and in the padding, and may be overwritten. With `accumulate`
        the result is added to `out`. Where nothing is cut (stage 0) `out` is [numel]: every rank gets all.
        None, on every rank alike: this time gradients travel as they would without a route.
        Collective, in one order of units on every rank.
        """
        ...


@runtime_checkable
class ParamRoute(Route, Protocol):
    """From each rank's shard of the parameters to whole copies on every rank."""

    def gather(self, unit: FlatUnit, shard: Tensor) -> Ticket:
        """`unit.whole` [numel] <- `shard` [shard_numel] of every rank that cuts the unit.

        Where the unit keeps its whole copy, the other ranks' parts of `unit.whole` hold what the last gather
        brought (the first time: the exact values), and this rank's own the new values; `shard` is memory of
        its own. Every rank must end with the same values. Collective, in one order of units on every rank.
        """
        ...
