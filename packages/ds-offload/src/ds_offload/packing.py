"""The part of a store that keeps frozen weights in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ds_core.state.store import Described, Kind
from ds_offload.home import Home
from ds_offload.policy import Split, Tiered
from ds_offload.quantized import PackedHome, Packing, plan_packing
from ds_offload.volume import Volume


class PackingStore:
    """Packs the shards of units that were announced, if the policy has a format for them."""

    policy: Tiered
    volume: Volume | None
    splits: Mapping[Kind, Split]
    _homes: dict[str, Home]
    _packed: dict[str, PackedHome]  # what is kept in fewer bits, by the same keys
    _packings: dict[str, Packing]  # of tensors that come next

    def expect(self, unit: Described) -> None:
        """Raises ValueError for a unit that trains where weights are to be kept in fewer bits."""
        format = self.policy.params_format
        if format is None or unit.shard_key is None or not unit.dtype.is_floating_point:
            return
        if unit.trainable:
            raise ValueError(
                f"{unit.key} trains, and params_format={format!r} keeps weights that never change: freeze "
                "the model (requires_grad_(False)), or leave params_format out"
            )
        if unit.dtype.itemsize > 1:  # 8-bit floats are as small as they get
            self._packings[unit.shard_key] = plan_packing(unit.layout, unit.rank, unit.dtype, format)

    def pack(self, key: str, init: Tensor) -> Tensor:
        """Keep an announced shard; returns what stands for it."""
        pinned = init.device.type == "cuda"
        home = PackedHome(self._packings.pop(key), self.splits["param"], self.volume, pinned=pinned)
        home.put(init)
        self._packed[key] = home
        return home.tensor

    def kept(self) -> list[Home | PackedHome]:
        """Everything that is off the device."""
        return [*self._homes.values(), *self._packed.values()]
