"""Counts parameters, MACs, FLOPs and time per module: forward, backward and recomputation, by dispatch."""

from __future__ import annotations

import contextlib
import sys
import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ds_core.observe import flop_rules
from ds_core.observe.flop_report import PHASES, Cost, FlopReport, ModuleCost, Phase
from ds_core.state.hooks import at_end_of_backward
from ds_core.train.clock import clock_for

Scope = tuple[str, ...]  # names of the modules that an operation counts for
_NOWHERE: Scope = ()


@dataclass(slots=True)
class _Sum:
    """What one operator has cost so far in one phase and scope."""

    flops: int = 0
    elementwise: int = 0
    calls: int = 0
    spans: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Marks:
    """When the innermost module changed, on autograd's own count of the nodes that a thread made."""

    at: list[int] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)

    def put(self, scope: Scope) -> None:
        self.at.append(torch._C._autograd._get_sequence_nr())
        self.scopes.append(scope)

    def find(self, number: int) -> Scope:
        """The modules that were running when the node with this number was made."""
        place = bisect_right(self.at, number) - 1
        return self.scopes[place] if place >= 0 else _NOWHERE


class FlopsProfiler:
    """Inside `with FlopsProfiler(model) as profiler:` every operator call counts for the modules around it.

    A torch dispatch mode sees the operators themselves, so attention kernels, custom operators and functions
    called from anywhere count; nothing is patched, and profilers may be nested. What a backward runs belongs
    to the module whose forward made the autograd node; what runs in a module's forward during a backward, or
    with gradients on, is recomputation. `torch.compile`d code runs as it was written while a profiler is on
    (and compiled again afterwards), since fused code shows no operators. Adding into `.grad` is not counted.
    The model may be sharded: parameters count by their logical shapes, and collectives as nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._clock = clock_for(device)
        self._sums: dict[tuple[Phase, Scope, str], _Sum] = defaultdict(_Sum)
        self._runs: dict[Phase, Counter[str]] = {phase: Counter() for phase in PHASES}
        self._stack: list[tuple[nn.Module, int, Scope]] = []  # module, backward it was entered in, scope
        self._marks: dict[int, _Marks] = defaultdict(_Marks)  # by thread
        self._thread = 0
        self._outer: int | None = None  # the backward that is recomputing
        self._open: contextlib.ExitStack | None = None
        self._lock = threading.Lock()  # autograd has a thread for each device

    def __enter__(self) -> FlopsProfiler:
        if self._open is not None:
            raise RuntimeError("this profiler is on already; use another FlopsProfiler inside it")
        self._thread = threading.get_ident()
        self._marks[self._thread].put(_NOWHERE)
        with contextlib.ExitStack() as stack:
            for module in self._names:
                for handle in self._hook(module):
                    stack.callback(handle.remove)
            stack.enter_context(_as_written())
            stack.enter_context(_Seeing(self))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()
        self._stack.clear()
        self._marks[self._thread].put(_NOWHERE)

    def report(self) -> FlopReport:
        """What was counted so far. Waits for the device to have done it."""
        costs: dict[tuple[Phase, str], Cost] = defaultdict(Cost)
        outside: dict[Phase, Cost] = defaultdict(Cost)
        operators: dict[Phase, dict[str, Cost]] = {phase: defaultdict(Cost) for phase in PHASES}
        for (phase, scope, operator), found in self._sums.items():
            seconds = sum(self._clock.seconds(begin, end) for begin, end in found.spans)
            cost = Cost(found.flops, found.elementwise, found.calls, seconds)
            for name in scope:
                costs[phase, name] += cost
            if scope:
                operators[phase][operator] += cost
            else:
                outside[phase] += cost
        modules = tuple(
            ModuleCost(
                name=name,
                kind=type(module).__name__,
                params=sum(param.numel() for param in module.parameters()),
                runs=self._runs["forward"][name],
                reruns=self._runs["recompute"][name],
                forward=costs["forward", name],
                backward=costs["backward", name],
                recompute=costs["recompute", name],
            )
            for module, name in self._names.items()
        )
        return FlopReport(
            modules,
            {phase: outside[phase] for phase in PHASES},
            {phase: dict(sorted(found.items(), key=_by_flops)) for phase, found in operators.items()},
        )

    # -- where an operator call belongs --------------------------------------------------------------------

    def _hook(self, module: nn.Module) -> list[RemovableHandle]:
        # Innermost of all hooks: what others do before and after a forward is not the module's work.
        enter = module.register_forward_pre_hook(self._enter)
        leave = module.register_forward_hook(self._leave, prepend=True, always_call=True)
        return [enter, leave]

    def _enter(self, module: nn.Module, args: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task != -1 and self._outer is None:
            self._outer = task
            at_end_of_backward(partial(self._end_of_backward, task))
        around = self._stack[-1][2] if self._stack and self._stack[-1][1] == task else _NOWHERE
        name = self._names[module]
        scope = tuple(dict.fromkeys((*around, *_with_parents(name))))
        self._stack.append((module, task, scope))
        self._runs["forward" if task == -1 else "recompute"][name] += 1
        self._marks[threading.get_ident()].put(scope)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if any(entry[0] is module for entry in self._stack):  # another hook may have raised before ours
            while self._stack.pop()[0] is not module:
                continue
        self._marks[threading.get_ident()].put(self._stack[-1][2] if self._stack else _NOWHERE)

    def _end_of_backward(self, task: int) -> None:
        if self._outer == task:
            self._outer = None

    def _place(self) -> tuple[Phase, Scope] | None:
        """The phase and modules that the present operator call counts for; None for adding into `.grad`."""
        task = torch._C._current_graph_task_id()
        top = self._stack[-1] if self._stack else None
        if task == -1 or (top is not None and top[1] == task):
            return "forward" if task == -1 else "recompute", top[2] if top is not None else _NOWHERE
        node = torch._C._current_autograd_node()
        if node is None:
            return "backward", _NOWHERE
        if node.name() == "torch::autograd::AccumulateGrad":
            return None
        # A checkpoint inside this backward builds its graph on the thread that runs the backward.
        nested = self._outer is not None and task != self._outer
        marks = self._marks[threading.get_ident() if nested else self._thread]
        again = torch.is_grad_enabled() and not torch._C._autograd._get_current_graph_task_keep_graph()
        return "recompute" if again else "backward", marks.find(node._sequence_nr())

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        place = self._place()
        if place is None or getattr(func, "is_view", False):
            return func(*args, **kwargs)
        begin = self._clock.mark()
        out = func(*args, **kwargs)
        end = self._clock.mark()
        flops = flop_rules.flops(func, args, kwargs, out)
        elementwise = flop_rules.elementwise(func, args, out)
        with self._lock:
            found = self._sums[*place, flop_rules.name_of(func)]
            found.flops += flops
            found.elementwise += elementwise
            found.calls += 1
            found.spans.append((begin, end))
        return out


class _Seeing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operator call to the profiler, those without a formula as what they are made of."""

    supports_higher_order_operators = True

    def __init__(self, profiler: FlopsProfiler) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._profiler = profiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if getattr(func, "namespace", "").endswith("c10d"):
            return func(*args, **options)
        if not flop_rules.has_formula(func) and hasattr(func, "decompose"):
            with self:
                made = func.decompose(*args, **options)
            if made is not NotImplemented:
                return made
        return self._profiler._count(func, args, options)


def profile_model(model: nn.Module, *args: Any, backward: bool | None = None, **kwargs: Any) -> FlopReport:
    """Run `model(*args, **kwargs)` once, and a backward from the sum of what it returns, and count both.

    `backward` None: if the model is in training mode. Gradients are dropped at the end. Works on meta
    tensors, for models larger than memory. Collective where the model is sharded.
    """
    wanted = model.training if backward is None else backward
    with torch.set_grad_enabled(wanted and torch.is_grad_enabled()), FlopsProfiler(model) as profiler:
        output = model(*args, **kwargs)
        if wanted:
            _total(output).backward()  # type: ignore[no-untyped-call]
    if wanted:
        model.zero_grad()
    return profiler.report()


def _total(output: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    tensors = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not tensors:
        raise ValueError(
            "profile_model: the output has no tensor that requires a gradient; pass backward=False, or let a "
            "parameter require one"
        )
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


@contextlib.contextmanager
def _as_written() -> Any:
    """Run compiled modules and torch's fused encoder layers operator by operator, until the end."""
    fused = torch.backends.mha.get_fastpath_enabled()
    # A mode that dynamo meets by itself makes it give up the compiled code for good.
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _with_parents(name: str) -> Scope:
    """ "a.b.c" -> "", "a", "a.b", "a.b.c"."""
    parts = name.split(".") if name else []
    return ("", *(".".join(parts[: end + 1]) for end in range(len(parts))))


def _by_flops(item: tuple[str, Cost]) -> int:
    return -item[1].flops
