"""The stages as rows of one table: what stays whole between uses, and the rest follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lifetime:
    """What a rank keeps whole between uses. Optimizer state and masters are always cut.

    With U units and A micro batches a step gathers each unit once where parameters stay whole and at most
    2 x A times where they do not, and reduces it once where gradients stay whole and A times where not.
    """

    whole_params: bool
    whole_grads: bool


# ZeRO (Rajbhandari et al., 2020), section 5: P_os, P_os+g, P_os+g+p.
STAGES = {1: Lifetime(True, True), 2: Lifetime(True, False), 3: Lifetime(False, False)}


def lifetime_of(stage: int) -> Lifetime:
    """The table's row. Raises ValueError naming the stages there are."""
    row = STAGES.get(stage)
    if row is None:
        raise ValueError(
            f"stage must be 1, 2 or 3, got {stage!r}: 1 cuts optimizer state, 2 gradients too, 3 parameters "
            "too (stage 0, plain data parallel, is ds_core.ReplicatedOwner)"
        )
    return row
