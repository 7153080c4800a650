"""Forward and backward hooks that make a unit whole for its users and let it go after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from ds_core.state.hooks import OwnerHooks, in_backward, outside_of_graphs
from ds_core.state.unit import FlatUnit, Whole
from ds_zero.gatherer import Gatherer
from ds_zero.prefetch import OrderHint


class Used(Protocol):
    """What the hooks ask of the owner whose units they bring and let go."""

    model: nn.Module
    units: list[FlatUnit]
    hooks: OwnerHooks
    gatherer: Gatherer
    depth: int


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and plain objects that a module returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for item in vars(value).values():
            yield from tensors_in(item)


def when_all_have_gradients(tensors: Sequence[Tensor], fn: Callable[[], None]) -> None:
    """Run `fn` in every backward in which each of the tensors has got its gradient, after the last one.

    torch's multi-grad hook would, in mode "all", hold the graph that holds it: nothing would ever be freed.
    """
    expected, seen = len(tensors), Counter[int]()

    def hook(grad: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        seen[backward] += 1
        if seen[backward] == expected:
            del seen[backward]
            fn()

    for tensor in tensors:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]


class UseHooks:
    """Registers the hooks of one owner and keeps the little state they need.

    A unit is held while a user's forward runs (`_active`), and again from the moment a gradient reaches a
    user's output until all of the unit's gradients are taken; the last units of a forward stay in between.
    Users that only look weights up by index (an embedding) need none of them for their backward, so none
    are gathered.
    """

    def __init__(self, owner: Used, *, prefetch_numel: int, keep_numel: int) -> None:
        self._owner = owner
        self._units = owner.units
        self._index = {id(unit): index for index, unit in enumerate(self._units)}
        self._active = [0] * len(self._units)
        self._backward_users = [0] * len(
            self._units
        )  # uses whose backward has begun and will say when it ends
        self._complete = [False] * len(self._units)  # all gradients of this backward are taken
        self._open_ended = [False] * len(self._units)  # a use has begun its backward and will not say when
        self._retired = False
        self._unannounced: dict[int, bool] = {}  # units read outside of their modules; is a backward to come?
        for unit in self._units:
            unit.bring = self._bring
        self._any_cut = any(not unit.keep_whole for unit in self._units)
        # By module, not by name: one module may have several names, and then a unit knows it by any of them.
        named = dict(owner.model.named_modules(remove_duplicate=False))
        users: dict[nn.Module, dict[int, FlatUnit]] = {}
        for unit in self._units:
            for name in unit.plan.users:
                users.setdefault(named[name], {})[self._index[id(unit)]] = unit
        # Definition order, a unit once for each of its users: what the first pass is expected to do.
        order = [index for module in owner.model.modules() for index in users.get(module, ())]
        numels = [unit.layout.numel for unit in self._units]
        self._hint = OrderHint(numels, prefetch_numel, order, keep=keep_numel)
        self._of_root = list(users.pop(owner.model, {}).values())
        handles = owner.hooks.handles
        for module, units in users.items():
            lookup = _only_looks_up(module)
            before = outside_of_graphs(partial(self._before_forward, list(units.values())))
            after = outside_of_graphs(partial(self._after_forward, list(units.values()), lookup))
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def retire(self) -> None:
        """The units were cut anew: what is left of these hooks, in graphs built before, does nothing."""
        self._let_unannounced_go()
        self._retired = True

    # -- forward -------------------------------------------------------------------------------------------

    def enter_root(self, args: Any) -> None:
        """The owner's hook before the root's forward, which outlives these."""
        if self._owner.depth == 1 and not in_backward():
            self._hint.begin()
        if self._of_root:
            self._before_forward(self._of_root, self._owner.model, args)

    def _before_forward(self, units: list[FlatUnit], module: nn.Module, args: Any) -> None:
        gatherer = self._owner.gatherer
        for unit in units:
            gatherer.launch(unit)
        backward = in_backward()
        for unit in units:
            index = self._index[id(unit)]
            self._active[index] += 1
            if self._any_cut and self._owner.depth > 0 and not backward:
                for ahead in self._hint.use(index):
                    gatherer.launch(self._units[ahead])
        gatherer.acquire_all(units)

    def _after_forward(
        self, units: list[FlatUnit], lookup: bool, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        backward = in_backward()
        for unit in units:
            index = self._index[id(unit)]
            self._active[index] -= 1
        if not self._any_cut:
            return
        waiting = torch.is_grad_enabled() and self._watch(units, lookup, (args, kwargs), output)
        for unit in units:
            index = self._index[id(unit)]
            kept = waiting and not lookup and index in self._hint.tail
            kept = kept or (self._owner.depth > 0 and self._hint.stays(index))
            if self._active[index] == 0 and not backward and not kept:
                self._owner.gatherer.release(unit)

    def _watch(self, units: list[FlatUnit], lookup: bool, inputs: Any, output: Any) -> bool:
        """Hook the output's gradients (bring the units back) and the inputs' (frozen units may go)."""
        outputs = [
            tensor for tensor in tensors_in(output) if tensor.requires_grad and tensor.grad_fn is not None
        ]
        if not outputs:
            return False
        entering = [] if lookup else [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
        before = partial(self._before_backward, units, lookup, bool(entering))
        register_multi_grad_hook(outputs, before, mode="any")
        if entering:
            when_all_have_gradients(entering, partial(self._after_backward, units))
        return True

    def _bring(self, unit: FlatUnit) -> bool:
        """A weight is read outside of its module (a fused loss that takes `lm_head.weight`, say).

        Inside a forward or backward all ranks come to that line, so it is gathered, and stays until the
        backward is over: nothing else says when the last use of it was.
        """
        if self._retired or (self._owner.depth == 0 and not in_backward()):
            return False
        self._hold_unannounced(self._index[id(unit)], torch.is_grad_enabled() or in_backward())
        return True

    def _hold_unannounced(self, index: int, needed: bool) -> None:
        if index not in self._unannounced:
            self._units[index].pinned += 1
        self._unannounced[index] = needed or self._unannounced.get(index, False)
        self._owner.gatherer.acquire(self._units[index])

    def _let_unannounced_go(self, *, of_backward: bool = True) -> None:
        """Of what was read outside of its module: all, or what no backward will ask for."""
        for index in [i for i, needed in self._unannounced.items() if of_backward or not needed]:
            del self._unannounced[index]
            self._units[index].pinned -= 1

    def leave_root(self, args: Any, kwargs: Any, output: Any) -> None:
        """The owner's hook after the root's forward, be it by an exception."""
        if self._of_root:
            lookup = _only_looks_up(self._owner.model)
            self._after_forward(self._of_root, lookup, self._owner.model, args, kwargs, output)
        if self._owner.depth != 1 or in_backward():
            return
        if torch.is_grad_enabled():
            outputs = [t for t in tensors_in(output) if t.requires_grad and t.grad_fn is not None]
            if outputs:
                again = [index for index, needed in self._unannounced.items() if needed]
                register_multi_grad_hook(outputs, partial(self._root_backward, again), mode="any")
        self._let_unannounced_go(of_backward=False)
        # What was fetched ahead for nobody, or held by a forward that raised, goes now.
        for index, unit in enumerate(self._units):
            self._active[index] = 0
            if not unit.keep_whole and (index not in self._hint.tail or not torch.is_grad_enabled()):
                self._owner.gatherer.release(unit)

    # -- backward ------------------------------------------------------------------------------------------

    def _root_backward(self, unannounced: list[int], grad: Tensor) -> None:
        """`unannounced`: what this graph read outside of modules; another's backward may have let it go."""
        self._owner.hooks.open_round()
        for index in unannounced if not self._retired else ():
            self._hold_unannounced(index, True)

    def _before_backward(self, units: list[FlatUnit], lookup: bool, ends: bool, grad: Tensor) -> None:
        self._owner.hooks.open_round()
        if self._retired or lookup:  # a tied embedding's place in the order is its last use, the head
            return
        gatherer = self._owner.gatherer
        for unit in units:
            index = self._index[id(unit)]
            self._backward_users[index] += ends
            self._open_ended[index] |= not ends
            gatherer.launch(unit)
        for ahead in self._hint.before(self._index[id(units[0])]):
            if not _needs_no_backward(self._units[ahead], self._owner.model):
                gatherer.launch(self._units[ahead])
        gatherer.acquire_all(units)

    def _after_backward(self, units: list[FlatUnit]) -> None:
        """The backward of one use is over. Units without another open use go, if no use is still to come."""
        if self._retired:
            return
        for unit in units:
            index = self._index[id(unit)]
            self._backward_users[index] = max(0, self._backward_users[index] - 1)
            over = self._complete[index] or not (unit.trainable or self._open_ended[index])
            if over and self._backward_users[index] == 0 and self._active[index] == 0:
                self._owner.gatherer.release(unit)

    def gradients_taken(self, unit: FlatUnit) -> None:
        """Every parameter of a unit has a gradient: it goes as soon as the backward of no use is under way.

        Re-entrant checkpointing takes gradients use by use, so more of them may come.
        """
        index = self._index[id(unit)]
        self._complete[index] = True
        if self._active[index] == 0 and self._backward_users[index] == 0:
            self._owner.gatherer.release(unit)

    def end_of_backward(self) -> None:
        """Whatever is still whole (unused parameters, wrong guesses) goes."""
        self._let_unannounced_go()
        for index, unit in enumerate(self._units):
            self._backward_users[index] = 0
            self._complete[index] = self._open_ended[index] = False
            if self._active[index] == 0 and unit.state is not Whole.ABSENT:
                self._owner.gatherer.release(unit)


def _only_looks_up(module: nn.Module) -> bool:
    """Does this module's backward need its indices only?"""
    return type(module) is nn.Embedding and module.max_norm is None


def _needs_no_backward(unit: FlatUnit, model: nn.Module) -> bool:
    return all(_only_looks_up(model.get_submodule(name)) for name in unit.plan.users)
