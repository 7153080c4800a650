"""Which unit will be wanted next: an order learned from the step before, read as a hint (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from ds_core.setup.shape import within


class OrderHint:
    """Follows a pass over the units and says what probably comes next.

    A wrong prediction costs a gather that nobody uses; it is never an error. The first pass is predicted
    from the definition order, every later one from the last complete pass.
    """

    def __init__(
        self, numels: Sequence[int], budget: int, order: Sequence[int] | None = None, *, keep: int = 0
    ) -> None:
        self._numels = list(numels)
        self._budget = budget  # elements that may be on their way ahead of the pass
        self._keep = keep  # elements that may stay from the end of the pass into the backward
        self._known = list(range(len(numels)) if order is None else order)
        self._seen: list[int] = []
        self._at = 0
        self.tail: frozenset[int] = self._find_tail()

    def _find_tail(self) -> frozenset[int]:
        """The units that the known pass ends with and its backward begins with, within what may be kept."""
        return frozenset(within(self._known[::-1], self._numels, self._keep))

    def begin(self) -> None:
        """A new pass starts: what was seen becomes what is known."""
        if self._seen:
            self._known = self._seen
            self.tail = self._find_tail()
        self._seen = []
        self._at = 0

    def use(self, unit: int) -> list[int]:
        """`unit` is used now; the next units to fetch, nearest first, within the budget (at least one)."""
        self._seen.append(unit)
        try:
            self._at = self._known.index(unit, self._at) + 1
        except ValueError:
            return []
        return self._ahead([other for other in self._known[self._at :] if other != unit])

    def stays(self, unit: int) -> bool:
        """Is `unit` what comes next again, so that letting it go would only bring it back?"""
        return self._at < len(self._known) and self._known[self._at] == unit

    def before(self, unit: int) -> list[int]:
        """`unit` is used in a backward pass: what the known pass used before it, nearest first."""
        if unit not in self._known:
            return []
        at = len(self._known) - 1 - self._known[::-1].index(unit)
        return self._ahead(self._known[:at][::-1])

    def _ahead(self, following: Sequence[int]) -> list[int]:
        return within(following, self._numels, self._budget)
