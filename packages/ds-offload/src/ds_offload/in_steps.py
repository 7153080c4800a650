"""What an update says that happens in steps, and nowhere else."""

from __future__ import annotations

from ds_core.state.unit import FlatUnit


class InSteps:
    """Nothing is updated ahead of a step, and between two steps homes are whole."""

    def expect(self, factor: float) -> None:
        """What gradients will be multiplied by is of no use yet."""

    def begin(self, unit: FlatUnit) -> None:
        """The step will come."""

    def settle(self) -> None:
        """Nothing is to be published."""
