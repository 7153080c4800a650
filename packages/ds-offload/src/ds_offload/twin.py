"""A second optimizer of the user's class and options, for parameters that are lent to it chunk by chunk."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.train.holdings import Piece

Number = float | Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """What gradients count: `read` is multiplied by the optimizer as it reads them (its `clip_coef`; None
    where it has none), `before` ahead of it, with a rounding of its own.
    """

    read: Number | None
    before: Number | None

    @classmethod
    def of(cls, optimizer: Any, factor: Number | None, *, low: bool) -> Scaling:
        """`low`: gradients are below fp32, where both ways round differently."""
        own = getattr(optimizer, "clip_coef", None)
        if own is None or factor is None or low:
            return cls(own, factor)
        return cls(own * factor, None)

    def same(self, other: Scaling) -> bool:
        """Would gradients be multiplied by the same numbers, bit for bit? Waits for a device's."""
        return all(
            (1.0 if one is None else float(one)) == (1.0 if two is None else float(two))
            for one, two in ((self.read, other.read), (self.before, other.before))
        )


class Twin:
    """The optimizer's rule with the options that its groups have now, on an object of its own.

    So a chunk's step leaves no trace in the user's optimizer, and may run on another thread while schedules
    change the groups. Attributes and options that a step changes are changed once in every step, by the
    optimizer's own, which comes afterwards and finds no gradients; every chunk starts from what was found.
    """

    def __init__(self, optimizer: Any, scaling: Scaling) -> None:
        self.scaling = scaling
        self._options = [_options(group) for group in optimizer.param_groups]
        self._settings = _settings(optimizer)
        groups = [dict(group, params=[]) for group in optimizer.param_groups]
        by_id = {id(group): own for group, own in zip(optimizer.param_groups, groups, strict=True)}
        self.optimizer = _likeness(optimizer, by_id, defaultdict(dict))
        if scaling.read is not None:
            self.optimizer.clip_coef = scaling.read
        self._groups = groups
        pairs = enumerate(optimizer.param_groups)
        self._group_of = {id(param): index for index, group in pairs for param in group["params"]}
        # torch wraps `step` with hooks, which are for the whole step and not for each chunk of it.
        step = type(optimizer).step
        self._inner = step.__wrapped__ if getattr(step, "hooked", False) else step

    def step(self, params: Sequence[tuple[Piece, nn.Parameter]]) -> None:
        """The optimizer's rule over these parameters alone, each in the group of its piece."""
        chosen: list[list[nn.Parameter]] = [[] for _ in self._options]
        for piece, param in params:
            chosen[self._group_of[id(piece.param)]].append(param)
        for group, options, mine in zip(self._groups, self._options, chosen, strict=True):
            group.update({**options, "params": mine})
        vars(self.optimizer).update(self._settings)
        self._inner(self.optimizer)

    def matches(self, optimizer: Any) -> bool:
        """Are the optimizer's groups, options and settings still those that were found?"""
        return (
            same(self._options, [_options(group) for group in optimizer.param_groups])
            and same(self._settings, _settings(optimizer))
            and self._group_of
            == {id(p): index for index, g in enumerate(optimizer.param_groups) for p in g["params"]}
        )


def same(one: Any, two: Any) -> bool:
    """Equal in type and value; tensors bit for bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, Mapping):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def _settings(optimizer: Any) -> dict[str, Any]:
    """Its own plain attributes, without `clip_coef`, which a `Scaling` speaks for."""
    kinds = (bool, int, float, str, Tensor)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, kinds) and name != "clip_coef" and not name.startswith("_")
    }


def _likeness(optimizer: Any, groups: Mapping[int, dict[str, Any]], state: dict[Any, Any]) -> Any:
    """An object of the same class with the same attributes, but for groups, state and hooks."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    for patched in ("step", "zero_grad"):  # by schedulers, and by ShardedOptimizer
        vars(twin).pop(patched, None)
    twin.param_groups = [groups[id(group)] for group in optimizer.param_groups]
    twin.state = state
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    # What ds-kernels' optimizers keep of tensors and of the last step: threads must not share it.
    for name in ("copy_out", "low_precision_grads", "_kept", "_batched"):
        if hasattr(optimizer, name):
            setattr(twin, name, {})
    if hasattr(optimizer, "optimizers"):
        twin.optimizers = [_likeness(member, groups, state) for member in optimizer.optimizers]
    return twin
