"""Telling a sharded model that it changed, instead of waiting until it notices."""

from __future__ import annotations

from torch import nn

from ds_core.state.owner import FlatOwner, owner_of


def replan(model: nn.Module) -> None:
    """Cut the model anew, now, where its parameters are not what they were when it was sharded.

    Needed by nobody: the next forward or step does it. It frees at once what frozen parameters no longer
    need (masters, unless a gradient still waits for a step), and `full_tensor` then knows new parameters.
    Collective: every rank has made the same change. Raises LookupError when no parameter is sharded,
    RuntimeError inside a forward or backward, or where ranks differ, naming rank and parameter.
    """
    owners: dict[int, FlatOwner] = {}
    for param in model.parameters():
        try:
            owner = owner_of(param)
        except LookupError:
            continue  # a new one
        owners[id(owner)] = owner
    if not owners:
        raise LookupError("no parameter of this model is sharded; shard the model first")
    for owner in owners.values():
        owner.replanner.replan()
