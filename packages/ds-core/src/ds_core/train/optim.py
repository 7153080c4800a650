"""Any torch optimizer over shards: the user's own object, its groups pointing at this rank's slices."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.layout import Cut
from ds_core.state.owner import FlatOwner
from ds_core.state.precision import norms_of
from ds_core.state.unit import FlatUnit, refuse_lost_writes
from ds_core.train.elsewhere import Elsewhere
from ds_core.train.holdings import Holdings, Piece, place_of
from ds_core.train.saved_optimizer import SavedOptimizer

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


class ShardedOptimizer(SavedOptimizer):
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
        self._outermost: FrameType | None = None  # of the step under way
        self._copied: frozenset[str] = frozenset()
        self._stepped: frozenset[str] = frozenset()
        away = owner.store.away
        self.elsewhere: Elsewhere | None = None if away is None else away.steps(self)
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
        if self.elsewhere is not None:
            self.elsewhere.cut_anew()
        self._offer_copy_out()
        _refuse_cut(self.optimizer, self.owner, self.held.members)

    def _offer_copy_out(self) -> None:
        """An optimizer that can write the low precision shard in the same pass is told where to."""
        out = getattr(self.optimizer, "copy_out", None)
        if out is None:
            return
        covered: dict[str, int] = {}
        for piece in self._here():
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

    def _here(self) -> list[Piece]:
        """The pieces that the optimizer's own step updates."""
        elsewhere = self.elsewhere
        return self.pieces if elsewhere is None else [p for p in self.pieces if not elsewhere.has(p.unit)]

    # -- the step ------------------------------------------------------------------------------------------

    def show_grads(self) -> None:
        """Drain, then point the `.grad` of every shard that is updated here at its reduced gradient."""
        self.owner.drain()
        direct = getattr(self.optimizer, "low_precision_grads", None)
        for piece in self._here():
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
        return [unit.gradient for unit in self._with_gradient() if unit.gradient is not None]

    def _with_gradient(self) -> list[FlatUnit]:
        return [unit for unit in self.owner.trainable if unit.gradient is not None]

    def norms(self) -> list[Tensor]:
        """The 2-norm of each of `gradients()`, 0-dim fp32 on the owner's device."""
        units, elsewhere = self._with_gradient(), self.elsewhere
        if elsewhere is None:
            return norms_of(self.gradients())
        found = dict(zip(units, elsewhere.norms(units), strict=True))
        return [found[unit].to(self.owner.device) for unit in units]

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiply every reduced gradient; those that live elsewhere when the step reads them."""
        elsewhere = self.elsewhere
        here = [
            unit.gradient
            for unit in self._with_gradient()
            if unit.gradient is not None and (elsewhere is None or not elsewhere.has(unit))
        ]
        if here:
            torch._foreach_mul_(here, factor)
        if elsewhere is not None:
            elsewhere.scale(factor)

    def expect(self, factor: float) -> None:
        """The step of the backward that begins will multiply gradients by this, unless it clips or skips.

        A wrong guess costs time where updates begin during the backward, and nothing else.
        """
        if self.elsewhere is not None:
            self.elsewhere.expect(factor)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """With a closure gradients come in the middle of the step: they are shown when it returns."""
        if self._calls_another():
            return None
        self._outermost = sys._getframe(1)
        self.owner.parked.need("a step", "param", "grad", "master", "moment")
        if not self._missed_said:
            self._missed_said = True
            _warn_of_missed(self.owner)
        refuse_lost_writes(self.owner.units)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._stepped = frozenset()
        if closure is None:
            self.show_grads()
        self.owner.changes.open()
        if closure is None:
            self._run_elsewhere()
            return None

        def shown() -> Any:
            loss = closure()
            self.show_grads()
            self._run_elsewhere()
            return loss

        return args[:1], {**kwargs, "closure": shown}

    def _calls_another(self) -> bool:
        """Is this the step of a class that the optimizer's extends, called by its own? Its hooks run twice.

        A step that raised has left its frame, and the next one is an outermost one again.
        """
        frame = sys._getframe(2)  # torch's wrapper around a step
        above = frame.f_back
        while self._outermost is not None and above is not None:
            if above is self._outermost:
                return True
            above = above.f_back
        return False

    def _run_elsewhere(self) -> None:
        if self.elsewhere is not None:
            with torch.no_grad():
                self._stepped = self.elsewhere.run()

    def _after_step(self, *_: Any) -> None:
        if self._calls_another():
            return
        self._outermost = None
        # Without a gradient the optimizer skips a parameter, and with it the copy-out: the old copy is right.
        self.owner.publish(wait=self.wait, copied=self._copied | self._stepped)
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
        if self.elsewhere is not None:
            self.elsewhere.forget()
        alone = len(optimizers_of(self.owner)) < 2
        self.owner.zero_grad(None if alone else self.slots)


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
