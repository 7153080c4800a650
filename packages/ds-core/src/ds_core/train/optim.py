"""Any torch optimizer over shards: the user's own object, its groups pointing at this rank's slices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.layout import Cut
from ds_core.state.owner import FlatOwner
from ds_core.state.saved import check_shapes
from ds_core.state.shard import FlatShard, Json, SavedTensor
from ds_core.state.unit import FlatUnit, refuse_lost_writes
from ds_core.train.holdings import Holdings, Piece, place_of

# torch optimizers whose update of an element looks at that element alone: their shards may be cut anywhere.
ELEMENTWISE = frozenset(
    {"SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "RMSprop", "Rprop"}
)
# ... and those that look at all parameters at once, or at gradients that have no dense form.
NOT_SHARDABLE = {
    "LBFGS": "its line search and history couple all parameters",
    "SparseAdam": "it needs sparse gradients, and flat buckets hold dense ones",
}

# Weak on both sides: the optimizer's hooks hold its sharded side.
_ATTACHED: WeakKeyDictionary[Optimizer, ReferenceType[ShardedOptimizer]] = WeakKeyDictionary()


def cut_for(optimizer: Optimizer) -> Cut:
    """`flat` for element-wise optimizers, else `whole`: an unknown optimizer never sees part of a matrix.

    An optimizer of your own says `elementwise = True` when its update is element-wise.
    Raises ValueError for optimizers that cannot be sharded at all.
    """
    kind = type(optimizer)
    declared = getattr(optimizer, "elementwise", None)
    if declared is not None:
        return "flat" if declared else "whole"
    if kind.__module__.startswith("torch.optim") and kind.__name__ in NOT_SHARDABLE:
        reason = NOT_SHARDABLE[kind.__name__]
        raise ValueError(f"{kind.__name__} cannot be sharded: {reason}; use stage 0, or another optimizer")
    own = getattr(torch.optim, kind.__name__, None) is kind
    return "flat" if own and kind.__name__ in ELEMENTWISE else "whole"


def cut_of_model(model: nn.Module, optimizer: Optimizer) -> Cut | frozenset[str]:
    """`Zero(cut=...)` for a model and its optimizer; of a joint one the names that must stay whole."""
    if cut_for(optimizer) == "flat" or not hasattr(optimizer, "optimizers"):
        return cut_for(optimizer)
    chosen = whole_groups(optimizer)
    groups = [group for group in optimizer.param_groups if id(group) in chosen]
    whole = {id(param) for group in groups for param in group["params"]}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, param in named if id(param) in whole)


def whole_groups(optimizer: Optimizer) -> set[int]:
    """Ids of the groups whose parameters this optimizer must see whole: all or none, or those of the members
    of a joint one that do.
    """
    members = getattr(optimizer, "optimizers", [optimizer])
    return {id(g) for member in members if cut_for(member) == "whole" for g in member.param_groups}


def attached(optimizer: Optimizer | ShardedOptimizer) -> ShardedOptimizer:
    """The sharded side of an optimizer that went through `shard`. Raises LookupError for any other."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer
    entry = _ATTACHED.get(optimizer)
    found = entry() if entry is not None else None
    if found is None:
        raise LookupError(f"this {type(optimizer).__name__} is not sharded; pass it through shard(...) first")
    return found


def optimizers_of(owner: FlatOwner) -> list[ShardedOptimizer]:
    """Every optimizer that steps on shards of this owner, oldest first."""
    found = [entry() for entry in _ATTACHED.values()]
    return [sharded for sharded in found if sharded is not None and sharded.owner is owner]


class ShardedOptimizer:
    """Swaps shards into `optimizer.param_groups`, in place: schedulers and user code keep their object.

    Groups keep their number, order and options. Before each step gradients are drained and shown as the
    shards' `.grad`; a parameter that got no gradient on any rank keeps `.grad` None and is skipped, as in
    plain torch. After each step the owner publishes. `optimizer.zero_grad()` drops everything.
    Collective: `step`.
    """

    def __init__(self, optimizer: Optimizer, owner: FlatOwner, *, wait: bool = True) -> None:
        self.optimizer = optimizer
        self.owner = owner
        _refuse_cut(optimizer, owner)
        self.wait = wait  # False: the engine's own loop, where the next forward waits for the gathers
        self._missed_said = False
        self._copied: frozenset[str] = frozenset()
        self.held = Holdings(optimizer, owner, self._cut_anew)
        self._offer_copy_out()
        owner.replanner.followers.append(ref(self.held))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]
        _ATTACHED[optimizer] = ref(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def pieces(self) -> list[Piece]:
        """What this rank updates."""
        return self.held.pieces

    @property
    def slots(self) -> dict[FlatUnit, list[int]]:
        """What the groups hold, on whichever rank it is."""
        return self.held.slots

    # -- construction, and whenever units are cut anew -----------------------------------------------------

    def _cut_anew(self) -> None:
        self._missed_said = False
        for kept in (getattr(self.optimizer, name, None) for name in ("copy_out", "low_precision_grads")):
            if kept is not None:
                kept.clear()
        self._offer_copy_out()
        _refuse_cut(self.optimizer, self.owner, self.held.members)

    def _offer_copy_out(self) -> None:
        """An optimizer that can write the low precision shard in the same pass is told where to."""
        out = getattr(self.optimizer, "copy_out", None)
        if out is None:
            return
        covered: dict[str, int] = {}
        for piece in self.pieces:
            unit = piece.unit
            if unit.master_dtype != unit.dtype:
                out[piece.param] = unit.local[slice(*piece.overlap.local)]
                covered[unit.key] = covered.get(unit.key, 0) + piece.param.numel()
        self._copied = frozenset(
            unit.key
            for unit in self.owner.trainable
            if covered.get(unit.key, 0)
            == sum(o.local[1] - o.local[0] for o in unit.layout.overlaps(unit.rank))
        )

    # -- the step ------------------------------------------------------------------------------------------

    def show_grads(self) -> None:
        """Drain, then point every shard's `.grad` at its reduced gradient."""
        self.owner.drain()
        direct = getattr(self.optimizer, "low_precision_grads", None)
        for piece in self.pieces:
            gradient = piece.unit.gradient
            if gradient is None or not piece.unit.has_grad[piece.overlap.index]:
                piece.param.grad = None
                if direct is not None:
                    direct.pop(piece.param, None)
                continue
            view = gradient[slice(*piece.overlap.local)].view(piece.param.shape)
            if view.dtype == piece.param.dtype:
                piece.param.grad = view
            elif direct is not None:
                direct[piece.param] = view
            else:
                piece.param.grad = view.to(piece.param.dtype)

    def gradients(self) -> list[Tensor]:
        """This rank's reduced gradients, one flat tensor per unit: [shard_numel]. Call `show_grads` first."""
        return [unit.gradient for unit in self.owner.trainable if unit.gradient is not None]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """With a closure gradients come in the middle of the step: they are shown when it returns."""
        if not self._missed_said:
            self._missed_said = True
            _warn_of_missed(self.owner)
        refuse_lost_writes(self.owner.units)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.show_grads()
        self.owner.changes.open()
        if closure is None:
            return None

        def shown() -> Any:
            loss = closure()
            self.show_grads()
            return loss

        return args[:1], {**kwargs, "closure": shown}

    def _after_step(self, *_: Any) -> None:
        # Without a gradient the optimizer skips a parameter, and with it the copy-out: the old copy is right.
        self.owner.publish(wait=self.wait, copied=self._copied)
        self.owner.replanner.stepped(self.held.members)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's own step, with what has to come before and after it."""
        return self.optimizer.step(closure)

    def skip_step(self) -> None:
        """Gradients are unusable (overflow): drop them and leave every weight as it is."""
        self.zero_grad()
        self.owner.reducer.forget_taken()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this optimizer's parameters, whole and sharded; other optimizers keep theirs.

        Always set to None: shards are cut anew each step.
        """
        for piece in self.pieces:
            piece.param.grad = None
        direct = getattr(self.optimizer, "low_precision_grads", None)
        if direct is not None:
            direct.clear()
        alone = len(optimizers_of(self.owner)) < 2
        self.owner.zero_grad(None if alone else self.slots)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def before_next_change(self, fn: Callable[[], None]) -> None:
        """State changes exactly when masters do."""
        self.owner.before_next_change(fn)

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """`<parameter>/<state>` as shards of the parameter's shape, and the groups' options as JSON."""
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
                shard = self._written(piece, value.detach())
                if shard is not None:
                    state[f"{piece.fqn}/{name}"] = shard
        state["groups"] = [self._options(group) for group in self.optimizer.param_groups]
        return state

    def _written(self, piece: Piece, value: Tensor) -> FlatShard | None:
        if value.numel() != piece.param.numel() or value.dim() == 0:
            return FlatShard(value.reshape(-1), value.shape, 0)
        part, (low, high) = self.owner.written_part(piece.unit), piece.overlap.local
        begin, end = max(low, part.start), min(high, part.stop)
        if begin >= end:
            return None
        flat = value.reshape(-1)[begin - low : end - low]
        return FlatShard(flat, piece.overlap.slot.shape, piece.overlap.begin + begin - low)

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
        mine = {slot.fqn: slot.shape for unit in self.owner.trainable for slot in unit.layout.slots}
        by_param: dict[str, dict[str, SavedTensor]] = {}
        for full, info in saved.items():
            fqn, _, name = full.rpartition("/")
            by_param.setdefault(fqn, {})[name] = info
        strangers = {fqn: () for fqn in by_param if fqn not in mine}
        if strangers:
            check_shapes({}, strangers)
        self.owner.changes.open()
        targets: dict[str, Tensor | FlatShard] = {}
        for piece in self.held.trained:
            state: dict[str, Any] = {}
            for name, info in by_param.get(piece.fqn, {}).items():
                if tuple(info.shape) == tuple(piece.overlap.slot.shape) and info.shape != torch.Size([]):
                    dtype = info.dtype
                    state[name] = torch.zeros_like(piece.param, dtype=dtype, requires_grad=False)
                    shard = FlatShard(state[name].view(-1), piece.overlap.slot.shape, piece.overlap.begin)
                else:
                    state[name] = torch.zeros(
                        info.shape, dtype=info.dtype, device=self._scalar_device(piece, name)
                    )
                    shard = FlatShard(state[name].view(-1), info.shape, 0)
                targets[f"{piece.fqn}/{name}"] = shard
            self.optimizer.state[piece.param] = state
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


def _refuse_cut(
    optimizer: Optimizer, owner: FlatOwner, members: Sequence[Sequence[Tensor]] | None = None
) -> None:
    """`members`: the groups' own parameters, once shards have taken their place."""
    if not owner.sharded or owner.comm.world == 1:
        return
    given = members or [group["params"] for group in optimizer.param_groups]
    whole = whole_groups(optimizer)
    for group, params in zip(optimizer.param_groups, given, strict=True):
        for param in params if id(group) in whole else ():
            if not param.requires_grad:
                continue
            unit, index = place_of(owner, param)
            if unit.trainable and unit.cut != "whole":
                raise ValueError(
                    f"{unit.layout.slots[index].fqn} is cut, but {type(optimizer).__name__} is not known to "
                    'be element-wise, so its parameters must stay whole: use Zero(..., cut="whole"), or '
                    "declare `elementwise = True` on its class if it is"
                )


def _warn_of_missed(owner: FlatOwner) -> None:
    """Said at an optimizer's first step, when all optimizers of the model are there."""
    found = [sharded.slots for sharded in optimizers_of(owner)]
    missed = [
        slot.fqn
        for unit in owner.trainable
        for index, slot in enumerate(unit.layout.slots)
        if not any(index in slots.get(unit, ()) for slots in found)
    ]
    if missed:
        warnings.warn(
            f"{len(missed)} trainable parameters are in no group of any optimizer and will not change: "
            f"{', '.join(missed[:5])}; add them, or set requires_grad=False before sharding",
            stacklevel=5,
        )
