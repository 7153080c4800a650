"""Which unit will be wanted next: an order learned from the step before, read as a hint (pure)."""

from __future__ import annotations

from collections.abc import Sequence


class OrderHint:
    """Follows a pass over the units and says what probably comes next.

    A wrong prediction costs a gather that nobody uses; it is never an error. The first pass is predicted
    from the definition order, every later one from the last complete pass.
    """

    def __init__(self, numels: Sequence[int], budget: int, order: Sequence[int] | None = None) -> None:
        self._numels = list(numels)
        self._budget = budget  # elements that may be on their way ahead of the pass
        self._known = list(range(len(numels)) if order is None else order)
        self._seen: list[int] = []
        self._at = 0

    @property
    def last(self) -> int | None:
        """The unit that the known pass ends with."""
        return self._known[-1] if self._known else None

    def begin(self) -> None:
        """A new pass starts: what was seen becomes what is known."""
        if self._seen:
            self._known = self._seen
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
        chosen: list[int] = []
        room = self._budget
        if room <= 0:
            return chosen
        for unit in following:
            if chosen and self._numels[unit] > room:
                break
            if unit not in chosen:
                chosen.append(unit)
                room -= self._numels[unit]
            if room <= 0:
                break
        return chosen
