"""Where momentum is held at zero, unit by unit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_core.setup.config import nearest
from ds_core.state.unit import FlatUnit


class Masks:
    """Masks by parameter as masks by unit; a unit without any costs nothing."""

    def __init__(self, masks: Mapping[str | Tensor, Tensor]) -> None:
        self._given = masks
        self._names: dict[int, str] = {}  # of parameters that were given themselves
        self._flat: dict[str, Tensor] = {}  # by the unit's key: [chunks] bool

    def connect(self, units: Sequence[FlatUnit], world: int) -> None:
        """Raises LookupError for a parameter that is not there, ValueError for a mask of another shape."""
        self._flat = {}
        for unit in units:
            for slot, param in zip(unit.layout.slots, unit.params, strict=True):
                self._names.setdefault(id(param), slot.fqn)
        by_name = {
            key
            if isinstance(key, str)
            else self._names.get(id(key), "a tensor that is no parameter here"): mask
            for key, mask in self._given.items()
        }
        slots = {slot.fqn: (unit, slot) for unit in units for slot in unit.layout.slots}
        for name, mask in by_name.items():
            if name not in slots:
                raise LookupError(
                    f"a momentum mask is for {name}, which does not train here; {nearest(name, slots)}"
                )
            unit, slot = slots[name]
            try:
                whole = torch.as_tensor(mask).to(unit.device).ne(0).expand(slot.shape)
            except RuntimeError:
                raise ValueError(
                    f"the momentum mask of {name} has shape {tuple(mask.shape)}; wanted: "
                    f"{tuple(slot.shape)}, or what broadcasts to it"
                ) from None
            numel = -(-unit.layout.numel // (8 * world)) * 8 * world
            flat = self._flat.setdefault(unit.key, torch.ones(numel, dtype=torch.bool, device=unit.device))
            flat[slot.start : slot.end].copy_(whole.reshape(-1))

    def digests(self) -> dict[str, str]:
        """What ranks compare: a digest for each unit that has a mask."""
        return {
            key: hashlib.sha256(bytes(flat.to("cpu", torch.uint8).numpy().data)).hexdigest()[:16]
            for key, flat in self._flat.items()
        }

    def apply_(self, unit: FlatUnit, value: Tensor, begin: int) -> None:
        """Zero what is masked of the unit's elements from `begin` on."""
        flat = self._flat.get(unit.key)
        if flat is not None:
            value.mul_(flat[begin : begin + value.numel()])
