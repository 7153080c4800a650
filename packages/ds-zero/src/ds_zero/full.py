"""One whole parameter for people: to print, compare or export."""

from __future__ import annotations

from torch import Tensor

from ds_core.state.owner import owner_of


def full_tensor(param: Tensor) -> Tensor:
    """A copy of a parameter's current values, whole, on every rank.

    Shapes: the parameter's own, in its own dtype. Collective at stage 3: every rank calls it.
    Raises LookupError for a tensor that is no parameter of a sharded model.
    """
    owner = owner_of(param)
    unit, _ = owner.place(param)
    with owner.whole([unit]):
        return param.detach().clone()
