"""A sharded optimizer by the names under which checkpoints hold its states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core.state.owner import FlatOwner
from ds_core.state.saved import check_shapes
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.train.elsewhere import Elsewhere
from ds_core.train.holdings import Holdings, Piece

_WIRE = "wire/"  # no parameter is called so: their names have no slash


class SavedOptimizer:
    """What a sharded optimizer is to checkpoints: the `Saveable` part of it."""

    optimizer: Optimizer
    owner: FlatOwner
    held: Holdings
    elsewhere: Elsewhere | None

    def before_next_change(self, fn: Callable[[], None]) -> None:
        """State changes exactly when masters do."""
        self.owner.before_next_change(fn)

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """`<parameter>/<state>` as shards of the parameter's shape, and the groups' options as JSON."""
        self.owner.parked.need("a checkpoint", "moment")
        self.held.look()
        self.owner.settle()
        state: dict[str, Tensor | FlatShard | Json] = {}
        for piece in self.held.trained:
            for name, value in self.optimizer.state.get(piece.param, {}).items():
                if value is None:
                    continue
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"{type(self.optimizer).__name__} keeps {name!r} as {type(value).__name__}; a "
                        "checkpoint holds tensors: keep it as a 0-dim tensor"
                    )
                shard = self._written(piece, name, value.detach())
                if shard is not None:
                    state[f"{piece.fqn}/{name}"] = shard
        state["groups"] = [self._options(group) for group in self.optimizer.param_groups]
        return state | self._routes_state()

    def _routes_state(self) -> dict[str, Tensor | FlatShard | Json]:
        """What the owner's routes remember: training state as moments are, and no weights."""
        return {
            f"{_WIRE}{kind}/{name}": value
            for kind, route in self.owner.routes.items()
            for name, value in route.state_dict().items()
        }

    def _written(self, piece: Piece, name: str, value: Tensor) -> FlatShard | None:
        if value.numel() != piece.param.numel() or value.dim() == 0:
            return FlatShard(value.reshape(-1), value.shape, 0)
        part, (low, high) = self.owner.written_part(piece.unit), piece.overlap.local
        begin, end = max(low, part.start), min(high, part.stop)
        if begin >= end:
            return None
        flat = value.reshape(-1)[begin - low : end - low]
        start = piece.overlap.begin + begin - low
        return FlatShard(flat, piece.overlap.slot.shape, start, self._paged(piece, name))

    def _paged(self, piece: Piece, name: str) -> Callable[[], object] | None:
        away = self.owner.store.away
        return None if away is None else away.paged(f"{piece.unit.key}/{name}")

    @staticmethod
    def _options(group: Mapping[str, Any]) -> dict[str, Json]:
        options: dict[str, Json] = {}
        for key, value in group.items():
            if key == "params":
                continue
            options[key] = value.item() if isinstance(value, Tensor) else value
        return options

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Allocates the states that the checkpoint holds; each is cut as its parameter is."""
        self.owner.parked.need("loading a checkpoint", "master", "moment")
        mine = {slot.fqn: slot.shape for unit in self.owner.trainable for slot in unit.layout.slots}
        by_param: dict[str, dict[str, SavedTensor]] = {}
        for full, info in saved.items():
            if full.startswith(_WIRE):
                continue
            fqn, _, name = full.rpartition("/")
            by_param.setdefault(fqn, {})[name] = info
        strangers = {fqn: () for fqn in by_param if fqn not in mine}
        if strangers:
            check_shapes({}, strangers)
        self.owner.changes.open()
        self.owner.settle()
        targets: dict[str, Tensor | FlatShard] = {}
        for piece in self.held.trained:
            state: dict[str, Any] = {}
            for name, info in by_param.get(piece.fqn, {}).items():
                if tuple(info.shape) == tuple(piece.overlap.slot.shape) and info.shape != torch.Size([]):
                    if self.elsewhere is not None and self.elsewhere.has(piece.unit):
                        state[name] = self.elsewhere.room(piece, name, info.dtype)
                    else:
                        state[name] = torch.zeros_like(piece.param, dtype=info.dtype, requires_grad=False)
                    flat, begin = state[name].view(-1), piece.overlap.begin
                    shard = FlatShard(flat, piece.overlap.slot.shape, begin, self._paged(piece, name))
                else:
                    state[name] = torch.zeros(
                        info.shape, dtype=info.dtype, device=self._scalar_device(piece, name)
                    )
                    shard = FlatShard(state[name].view(-1), info.shape, 0)
                targets[f"{piece.fqn}/{name}"] = shard
            self.optimizer.state[piece.param] = state
        for kind, route in self.owner.routes.items():
            found = route.load_targets(_of_route(kind, saved))
            targets |= {f"{_WIRE}{kind}/{name}": target for name, target in found.items()}
        return targets

    def _scalar_device(self, piece: Piece, name: str) -> torch.device:
        """torch keeps `step` on the host unless the group is capturable or fused on a device."""
        for group in self.optimizer.param_groups:
            if any(param is piece.param for param in group["params"]):
                on_device = group.get("capturable") or group.get("fused")
                return piece.param.device if on_device or name != "step" else torch.device("cpu")
        return piece.param.device

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """The groups' options. Raises ValueError when the number of groups differs."""
        groups = values["groups"]
        if len(groups) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the checkpoint has {len(groups)} parameter groups, the optimizer "
                f"{len(self.optimizer.param_groups)}; build the optimizer as it was built then"
            )
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in options.items():
                old = group.get(key)
                if isinstance(old, Tensor):
                    old.fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(old, tuple) else value
        for kind, route in self.owner.routes.items():
            route.load_state_dict(_of_route(kind, values))


def _of_route(kind: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of one route, by its own names; none in a checkpoint of a run without it."""
    prefix = f"{_WIRE}{kind}/"
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
