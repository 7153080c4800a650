"""Several optimizers over one model as one: Muon for matrices, AdamW for the rest, one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ds_core.train.optim import cut_for


class JointOptimizer(Optimizer):
    """Its groups and state are those of its members, the very objects; a step is one step of each, in order.

    So whatever takes an optimizer takes several: `shard`, `Engine`, schedules, clipping, checkpoints. Sharded
    as one they publish the new weights once in a step, where one by one each would. Members are joined before
    they are sharded, and groups are added to a member before it is joined.
    Raises ValueError when a parameter is in two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers: list[Optimizer] = []
        super().__init__([group for member in optimizers for group in member.param_groups], {})
        for member in optimizers:
            self.state.update(member.state)
        self.optimizers = list(optimizers)
        self._share()

    @property
    def elementwise(self) -> bool:
        """May every parameter be cut anywhere?"""
        return all(cut_for(member) == "flat" for member in self.optimizers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for member in self.optimizers:
            member.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.optimizers:
            raise ValueError(
                "which of the joined optimizers is this group for? Add it to that one before joining them"
            )
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`load_state_dict` ends here with new groups and states: the members must have the same."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        at = 0
        for member in self.optimizers:
            count = len(member.param_groups)
            member.param_groups = self.param_groups[at : at + count]
            member.state = self.state
            at += count
