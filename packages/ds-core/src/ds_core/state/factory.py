"""From a model to its units, by one owner's settings: at construction, and whenever they are cut anew."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from ds_core.state.layout import Cut
from ds_core.state.precision import Precision
from ds_core.state.unit import FlatUnit
from ds_core.state.units import Kind, Split, UnitPlan, plan_units


class UnitFactory:
    """Plans and makes the units of one rank. `world` 1 where every rank keeps everything."""

    def __init__(
        self,
        precision: Precision,
        *,
        rank: int,
        world: int,
        device: torch.device,
        cut: Cut | frozenset[str],
        split: Split,
        keep_whole: Callable[[UnitPlan], bool],
        master_apart: bool,
    ) -> None:
        self._precision, self._rank, self._world = precision, rank, world
        self._device, self._cut, self._split = device, cut, split
        self._keep_whole, self._master_apart = keep_whole, master_apart

    def plan(self, model: nn.Module, lingering: Container[int] = ()) -> tuple[UnitPlan, ...]:
        """The units that the model's present parameters make.

        `lingering`: ids of frozen parameters that still count as trainable.
        """

        def kind_of(fqn: str, param: nn.Parameter) -> Kind:
            return self._precision.of_param(fqn, param), param.requires_grad or id(param) in lingering

        split = self._split
        return plan_units(model, bucket_numel=split.bucket_numel, kind_of=kind_of, leaves=split.leaves)

    def make(self, plan: UnitPlan, *, whole: bool = False) -> FlatUnit:
        """A unit without memory yet. `whole`: its parameters stay whole, whatever the settings say."""
        return FlatUnit(
            plan,
            world=self._world,
            rank=self._rank,
            device=self._device,
            precision=self._precision,
            cut="whole" if whole else self._cut_of(plan),
            keep_whole=self._keep_whole(plan),
            master_apart=self._master_apart,
        )

    def _cut_of(self, plan: UnitPlan) -> Cut:
        """A unit is cut one way: whole as soon as one of its parameters has to be."""
        if isinstance(self._cut, str):
            return self._cut
        return "whole" if any(name in self._cut for name, _ in plan.params) else "flat"


def flatten(unit: FlatUnit) -> Tensor:
    """The parameters' present values in one buffer [numel], in the master's dtype, padding zero."""
    flat = torch.zeros(unit.layout.numel, dtype=unit.master_dtype, device=unit.device)
    for slot, param in zip(unit.layout.slots, unit.params, strict=True):
        flat[slot.start : slot.end].view(slot.shape).copy_(param.detach())
    return flat
