"""The hooks that every owner registers: gradients into the reducer, whole parameters for state_dict."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from ds_core.state.parked import Parked
from ds_core.state.reduce import GradReducer
from ds_core.state.shard import ChangeGate
from ds_core.state.unit import FlatUnit

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """A floating point dtype from its name. Raises ValueError listing the names."""
    if name is None or isinstance(name, torch.dtype):
        if name is not None and name not in _DTYPES.values():
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name}")
        return name
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def in_backward() -> bool:
    """Is autograd running a backward on this thread? (torch offers no public question)"""
    return bool(torch._C._current_graph_task_id() != -1)


def at_end_of_backward(fn: Any) -> None:
    """Run `fn` when the backward that is running now has finished."""
    Variable._execution_engine.queue_callback(fn)


def outside_of_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook as torch.compile must see it: a call to make between two graphs, nothing to trace into."""

    def call(*args: Any) -> None:
        if torch.compiler.is_compiling():  # only while dynamo traces this very call
            disable: Any = torch._dynamo.disable
            disable(hook, recursive=True)(*args)
        else:
            hook(*args)

    return call


class Hooked(Protocol):
    """What the hooks ask of the owner that they are registered for."""

    model: nn.Module
    units: list[FlatUnit]
    trainable: list[FlatUnit]
    reducer: GradReducer
    parked: Parked
    changes: ChangeGate

    def gradients_taken(self, unit: FlatUnit) -> None: ...
    def close_round(self) -> None: ...
    def zero_grad(self) -> None: ...
    def whole(self, units: Sequence[FlatUnit]) -> AbstractContextManager[None]: ...


class OwnerHooks:
    """Registers everything on the user's module and parameters, and can take it all away again."""

    def __init__(self, owner: Hooked) -> None:
        self._owner = owner
        self.handles: list[RemovableHandle] = []
        for index, unit in enumerate(owner.trainable):
            for slot, param in enumerate(unit.params):
                trains = param.requires_grad  # one that is frozen only just may thaw where it is
                param.requires_grad_(True)
                self.handles.append(
                    param.register_post_accumulate_grad_hook(self._taker(index, slot))  # type: ignore[no-untyped-call]
                )
                param.requires_grad_(trains)
        holders = self._holders()
        for module, units in holders.items():
            self._hook_state_dict(module, units)
        self._replaced = vars(owner.model).get("zero_grad")
        self._zero_grad = owner.model.zero_grad
        owner.model.zero_grad = self._dropping  # type: ignore[method-assign]

    def remove(self) -> None:
        """The module is an ordinary one again (its parameters stay views of the unit's buffers)."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self._replaced is None:
            del self._owner.model.zero_grad
        else:
            self._owner.model.zero_grad = self._replaced  # type: ignore[method-assign]

    def _dropping(self, set_to_none: bool = True) -> None:
        """`model.zero_grad()` must drop the shards' gradients too, or the next step would use them."""
        self._zero_grad(set_to_none)
        self._owner.zero_grad()

    def _taker(self, index: int, slot: int) -> Any:
        # Weak: Python's collector does not see through a parameter to its gradient hook. The module's hooks
        # keep this object.
        found = weakref.ref(self)

        def take(param: Tensor) -> None:
            grad, hooks = param.grad, found()
            if grad is None or hooks is None:
                return
            hooks.open_round()
            owner = hooks._owner
            complete = owner.reducer.take(index, slot, grad)
            param.grad = None
            if complete:
                owner.gradients_taken(owner.trainable[index])

        return take

    def open_round(self) -> None:
        """The first sign of a backward: open the reducer's round, and close it when autograd is done."""
        if not self._owner.reducer.in_round:
            self._owner.parked.need("a backward", "param", "grad")
            self._owner.reducer.open_round()
            at_end_of_backward(self._owner.close_round)

    # -- state_dict and load_state_dict on the user's module -----------------------------------------------

    def _holders(self) -> dict[nn.Module, list[FlatUnit]]:
        """Module -> units of the parameters that it holds directly."""
        place = {id(param): unit for unit in self._owner.units for param in unit.params}
        found: dict[nn.Module, list[FlatUnit]] = {}
        for module in self._owner.model.modules():
            units = dict.fromkeys(place[id(p)] for p in module._parameters.values() if p is not None)
            if units:
                found[module] = list(units)
        return found

    def _hook_state_dict(self, module: nn.Module, units: list[FlatUnit]) -> None:
        """`state_dict()` gives whole values and `load_state_dict()` reaches masters. Collective."""
        owner, open_contexts = self._owner, []

        def enter(*args: Any) -> None:
            context = owner.whole(units)
            context.__enter__()
            open_contexts.append(context)

        def enter_loading(*args: Any) -> None:
            owner.parked.need("load_state_dict", "param", "master")
            enter()

        def leave_saved(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
            if any(not unit.keep_whole for unit in units):
                for name in module._parameters:
                    if isinstance(state.get(prefix + name), Tensor):
                        state[prefix + name] = state[prefix + name].detach().clone()
            open_contexts.pop().__exit__(None, None, None)

        def leave_loaded(module: nn.Module, incompatible: Any) -> None:
            owner.changes.open()
            for unit in units:
                unit.absorb_whole()
            open_contexts.pop().__exit__(None, None, None)

        hooks: Any = module  # torch leaves these four registrations untyped
        self.handles.append(hooks.register_state_dict_pre_hook(enter))
        self.handles.append(hooks.register_state_dict_post_hook(leave_saved))
        self.handles.append(hooks.register_load_state_dict_pre_hook(enter_loading))
        self.handles.append(hooks.register_load_state_dict_post_hook(leave_loaded))
