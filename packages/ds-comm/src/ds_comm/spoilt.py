"""Momenta that are not finite: who has them, and how all ranks come to raise in the same step."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_core.state.owner import FlatOwner
from ds_core.state.unit import FlatUnit
from ds_core.train.nonfinite import NonFiniteError


class SpoiltMomenta:
    """Where momenta travel every rank sees NaN scales; where they stay, ranks are asked before the step."""

    def __init__(self) -> None:
        self._names: list[str] = []  # of this rank's parameters, in a step in which nothing travels

    def error(self, owner: FlatOwner, unit: FlatUnit, value: Tensor) -> NonFiniteError:
        """What to raise once it is known that a rank has such momenta; `value`: this one's [numel]."""
        return _error(owner, _spoilt(unit, value))

    def note(self, unit: FlatUnit, value: Tensor) -> bool:
        """Keep in mind what of `value` [numel] is not finite. True if something is."""
        names = "" if _is_finite(value) else _spoilt(unit, value)
        self._names += [names] if names else []
        return bool(names)

    def refuse(self, owner: FlatOwner) -> None:
        """Raises NonFiniteError on all ranks if one has noted something since the last call. Collective."""
        names = ", ".join(self._names)
        self._names.clear()
        flag = torch.tensor([1.0 if names else 0.0])
        owner.control.all_reduce(flag, op="max", about="whether momenta are finite").wait()
        if flag.item():
            raise _error(owner, names)


def _is_finite(value: Tensor) -> bool:
    """By the extremes, which are NaN where an element is: one pass, and nothing made."""
    return not value.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def _spoilt(unit: FlatUnit, value: Tensor) -> str:
    slots = [s for s in unit.layout.slots if not _is_finite(value[s.start : s.end])]
    return ", ".join(slot.fqn for slot in slots)


def _error(owner: FlatOwner, names: str) -> NonFiniteError:
    what = f"this rank's gradient of {names} is not finite and was not sent"
    if not names:
        what = "another rank's gradient is not finite, and its momentum was not sent"
    return NonFiniteError(
        f"rank {owner.everyone.rank}: {what}. No weight was changed; call optimizer.zero_grad() before going "
        "on. Lower the learning rate, or look at this batch"
    )
