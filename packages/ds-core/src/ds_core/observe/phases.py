"""Tells an observer when the phases of a training step begin and end, on an engine or on a plain loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Communicator
from ds_core.state.hooks import at_end_of_backward, in_backward
from ds_core.state.owner import FlatOwner, owner_of
from ds_core.train.engine import Engine

_COLLECTIVES = {
    "all_gather": "gather",
    "reduce_scatter": "reduce",
    "all_reduce": "reduce",
    "all_to_all": "exchange",
    "broadcast": "broadcast",
}


class Observer(Protocol):
    """What phases are told to. `phase`: forward, backward, step, gather, reduce, exchange, broadcast, wait.

    `of`: the module or unit, empty for the whole model. What `begin` returns comes back to `end`.
    """

    def begin(self, phase: str, of: str) -> Any: ...
    def end(self, begun: Any) -> None: ...
    def stepped(self) -> None: ...


class _WatchedTicket(Ticket):
    """A ticket whose waiting is a phase."""

    __slots__ = ("_inner", "_phases", "_what")

    def __init__(self, inner: Ticket, phases: Phases, what: str) -> None:
        super().__init__()
        self._inner, self._phases, self._what = inner, phases, what

    def wait(self) -> None:
        begun = self._phases.begin("wait", self._what)
        try:
            self._inner.wait()
        finally:
            self._phases.end(begun)


class Phases:
    """Hooks on a model, its optimizer and its communicators, from now until `detach`.

    With an engine, `backward` and `step` are the engine's. In a plain loop a step is the optimizer's, and a
    backward begins when the first gradient reaches the model's output (`own_backward` False leaves it out:
    it begins inside of what autograd calls its own first step). `per_unit` also tells of the modules that
    units belong to and of collectives being launched. Detach in any order.
    """

    def __init__(
        self,
        target: Engine | nn.Module,
        observer: Observer,
        *,
        optimizer: Optimizer | None = None,
        own_backward: bool = True,
        per_unit: bool = False,
    ) -> None:
        self._observer = observer
        self._on = True
        self._undo = contextlib.ExitStack()
        self._in_backward = False
        self._per_unit = per_unit
        self._own_backward = own_backward and not isinstance(target, Engine)
        self._engine = target if isinstance(target, Engine) else None
        self._forwards: list[tuple[nn.Module, Any]] = []
        model = target.model if isinstance(target, Engine) else target
        self._owner = target.owner if isinstance(target, Engine) else _owner_of(model)
        self._watch_module(model, "")
        if per_unit and self._owner is not None:
            for name in dict.fromkeys(user for unit in self._owner.units for user in unit.plan.users):
                if name:
                    self._watch_module(model.get_submodule(name), name)
        if self._engine is not None:
            self._wrap(self._engine, "backward", self._timed_backward)
            self._wrap(self._engine, "step", self._timed_step)
        elif optimizer is not None:
            self._watch_optimizer(optimizer)
        if self._owner is not None:
            for comm in _communicators(self._owner):
                if comm.world > 1 or per_unit:  # alone there is nothing to wait for
                    for op in _COLLECTIVES:
                        self._wrap(comm, op, functools.partial(self._watched, op))

    def detach(self) -> None:
        """Everything is as it was."""
        self._on = False
        self._undo.close()

    @contextlib.contextmanager
    def during(self, phase: str, of: str = "") -> Any:
        """A phase from here to the end of the block."""
        begun = self.begin(phase, of)
        try:
            yield
        finally:
            self.end(begun)

    def begin(self, phase: str, of: str) -> Any:
        """A phase begins; None once detached."""
        return self._observer.begin(phase, of) if self._on else None

    def end(self, begun: Any) -> None:
        """What `begin` began is over."""
        if begun is not None:
            self._observer.end(begun)

    # -- forward and backward ------------------------------------------------------------------------------

    def _watch_module(self, module: nn.Module, name: str) -> None:
        enter = functools.partial(self._enter, name)
        leave = functools.partial(self._leave, name)
        # Outermost of all hooks: gathers before a forward are part of it.
        hooks = (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
        for hook in hooks:
            self._undo.callback(hook.remove)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if not name and not in_backward():  # whatever an exception left open
            self._forwards.clear()
            self._in_backward = False
        if name or not in_backward():
            phase = "recompute" if in_backward() else "forward"
            self._forwards.append((module, self._observer.begin(phase, name)))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._forwards and self._forwards[-1][0] is module:
            self._observer.end(self._forwards.pop()[1])
        if not name and self._own_backward and not in_backward():
            ends = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None]
            if ends:
                register_multi_grad_hook(ends, self._first_gradient, mode="any")

    def _first_gradient(self, grad: Tensor) -> None:
        if self._on and not self._in_backward:
            self._in_backward = True
            begun = self._observer.begin("backward", "")

            def end() -> None:
                self._in_backward = False
                self._observer.end(begun)

            at_end_of_backward(end)

    def _timed_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during("backward"):
                return backward(*args, **kwargs)

        return timed

    # -- the step ------------------------------------------------------------------------------------------

    def _timed_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during("step"):
                report = step(*args, **kwargs)
            if report is not None and self._on:
                self._observer.stepped()
            return report

        return timed

    def _watch_optimizer(self, optimizer: Optimizer) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.clear()
            begun.append(self._observer.begin("step", ""))

        def after(*_: Any) -> None:
            if begun:
                self._observer.end(begun.pop())
                self._observer.stepped()

        pre, post = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        # Outermost here too: what a sharded optimizer drains and publishes is part of its step.
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(pre.id, last=False)
        self._undo.callback(pre.remove)
        self._undo.callback(post.remove)

    # -- collectives ---------------------------------------------------------------------------------------

    def _watched(self, op: str, issue: Callable[..., Ticket]) -> Callable[..., Ticket]:
        phase = _COLLECTIVES[op]

        def watched(*args: Any, **kwargs: Any) -> Ticket:
            if not self._on:
                return issue(*args, **kwargs)
            if not self._per_unit:
                return _WatchedTicket(issue(*args, **kwargs), self, phase)
            of = str(kwargs.get("about") or self._unit_of(args))
            with self.during(phase, of):
                ticket = issue(*args, **kwargs)
            return _WatchedTicket(ticket, self, f"{phase} {of}".strip())

        return watched

    def _unit_of(self, tensors: tuple[Any, ...]) -> str:
        """The unit whose whole copy or gradient is among the tensors of a collective."""
        units = self._owner.units if self._owner is not None else ()
        for unit in units:
            if any(tensor is unit.whole or tensor is unit.gradient for tensor in tensors):
                return unit.key
        return ""

    def _wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put a method of one object inside another, and take it out again at the end."""
        before = vars(owner).get(name)
        made = make(getattr(owner, name))
        setattr(owner, name, made)

        def undo() -> None:
            if vars(owner).get(name) is not made:
                return  # somebody else's is around ours, which from now on only passes on
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.callback(undo)


def _communicators(owner: FlatOwner) -> list[Communicator]:
    """All that the owner and its gatherer send by, each once."""
    holders = [owner, getattr(owner, "gatherer", None)]
    held = [value for holder in holders if holder is not None for value in vars(holder).values()]
    return list({id(value): value for value in held if isinstance(value, Communicator)}.values())


def _owner_of(model: nn.Module) -> FlatOwner | None:
    for param in model.parameters():
        try:
            return owner_of(param)
        except LookupError:
            return None
    return None
