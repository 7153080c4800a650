"""Optimizers and schedulers by the names DeepSpeed files use: checked first, built later."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.optim import Optimizer

from ds_core.setup import plugins
from ds_core.setup.config import Problem, nearest
from ds_core.setup.plan import Named
from ds_core.train.lr import CycleShape
from ds_core.train.schedule import SCHEDULES, build_schedule, torch_schedules

# DeepSpeed's own names, in any case. Others must be spelled as in torch.optim.
_ADAM = ("adam", "adamw")
_BY_PLUGIN = ("lamb", "lion", "muon", "onebitadam", "zerooneadam", "onebitlamb")
_MUP = ("muadam", "muadamw", "musgd")

# params of DeepSpeed's Adam that torch's does not have -> the values that change nothing here
_ADAM_ONLY: Mapping[str, tuple[Any, ...]] = {
    "bias_correction": (True,),
    "set_grad_none": (True, False),
    "fp32_optimizer_states": (True, None),
}


def torch_optimizers() -> dict[str, type[Optimizer]]:
    """torch's optimizers by name."""
    found = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {
        name: value
        for name, value in found.items()
        if issubclass(value, Optimizer) and value is not Optimizer
    }


def plan_optimizer(kind: str, params: Mapping[str, Any]) -> tuple[Named | None, list[Problem]]:
    """The optimizer that a DeepSpeed file names, as an exact torch or plug-in name and its arguments.

    Adam without `torch_adam` has DeepSpeed's default weight decay, 0, and is AdamW unless `adam_w_mode` is
    false.
    """
    problems: list[Problem] = []
    options, kernel = dict(params), None
    if "max_grad_norm" in options:
        wrong = f"given {options.pop('max_grad_norm')!r}; no optimizer clips: set gradient_clipping instead"
        problems.append(Problem("optimizer.params.max_grad_norm", wrong))
    lower = kind.lower()
    if lower in _ADAM:
        plain = options.get("torch_adam", False)
        name = _plan_adam(lower, options, problems)
        kernel = None if plain else f"fused_{name.lower()}"
    elif lower == "adagrad":
        name, kernel = "Adagrad", "fused_adagrad"
    elif lower in _MUP:
        wrong = f"given {kind!r}; build mup's {kind} yourself and pass it to initialize(optimizer=)"
        problems.append(Problem("optimizer.type", wrong))
        return None, problems
    elif plugins.find("optimizer", lower) is not None:
        return Named(type=lower, params=options), problems
    elif lower in _BY_PLUGIN:
        problems.append(Problem("optimizer.type", f"given {kind!r}; {plugins.missing('optimizer', lower)}"))
        return None, problems
    elif kind in torch_optimizers():
        name = kind
    else:
        known = [*torch_optimizers(), *(p.capitalize() for p in _BY_PLUGIN)]
        problems.append(Problem("optimizer.type", f"given {kind!r}; {nearest(kind, known)}"))
        return None, problems
    problems += _unknown("optimizer.params", options, _parameters(torch_optimizers()[name]), kind)
    return Named(type=name, params=options, kernel=kernel), problems


def _plan_adam(lower: str, options: dict[str, Any], problems: list[Problem]) -> str:
    decoupled = options.pop("adam_w_mode", True) or lower == "adamw"
    if options.pop("torch_adam", False):
        return "AdamW" if decoupled else "Adam"
    options.setdefault("weight_decay", 0.0)
    for name, harmless in _ADAM_ONLY.items():
        value = options.pop(name, harmless[0])
        if value not in harmless:
            allowed = ", ".join(str(one).lower() for one in harmless)
            problems.append(Problem(f"optimizer.params.{name}", f"given {value!r}; allowed: {allowed}"))
    return "AdamW" if decoupled else "Adam"


def build_optimizer(named: Named, params: Iterable[Any]) -> Optimizer:
    """The optimizer over these parameters (or groups): ds-kernels' own where it is installed."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in named.params.items()
    }  # betas is a list in JSON, and a tuple in torch's state
    kernel = plugins.find("optimizer", named.kernel) if named.kernel else None
    if kernel is not None and set(options) <= set(_parameters(kernel)):
        cls = kernel
    else:
        cls = plugins.find("optimizer", named.type) or torch_optimizers()[named.type]
    made: Optimizer = cls(params, **options)
    return made


def plan_scheduler(kind: str, params: Mapping[str, Any]) -> tuple[Named | None, list[Problem]]:
    """The schedule that a file names, with its arguments checked by name."""
    classes: dict[str, Any] = {**torch_schedules(), **SCHEDULES}
    own = plugins.find("schedule", kind)
    if own is None and kind not in classes:
        return None, [Problem("scheduler.type", f"given {kind!r}; {nearest(kind, classes)}")]
    names = _parameters(own or classes[kind])
    if kind == "OneCycle":
        names |= {field.name: False for field in fields(CycleShape)}
    problems = _unknown("scheduler.params", params, names, kind)
    for name, needed in names.items():
        if needed and name not in params:
            problems.append(Problem(f"scheduler.params.{name}", f"needed by {kind}, but not given"))
    return Named(type=kind, params=dict(params)), problems


def build_scheduler(named: Named, optimizer: Optimizer) -> Any:
    """The schedule over this optimizer; always something a checkpoint can hold."""
    own = plugins.find("schedule", named.type)
    return own(optimizer, **named.params) if own else build_schedule(named.type, optimizer, named.params)


def _parameters(cls: Any) -> dict[str, bool]:
    """Argument names after the first (parameters or optimizer); true for those that must be given."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    listed = list(inspect.signature(cls).parameters.values())[1:]
    return {p.name: p.default is inspect.Parameter.empty for p in listed if p.kind not in variadic}


def _unknown(section: str, given: Iterable[str], known: Mapping[str, bool], owner: str) -> list[Problem]:
    return [
        Problem(f"{section}.{name}", f"{owner} has no such parameter; {nearest(name, known)}")
        for name in given
        if name not in known
    ]
