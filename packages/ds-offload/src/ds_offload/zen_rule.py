"""An optimizer's rule over tensors that are none of its own, with the options that it had at one moment."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_core.state.shard import Json

SAVED = "zenflow"  # under which groups hold what a checkpoint must


@dataclass(slots=True)
class Given:
    """One flat stretch of a parameter: `master` and `states` are updated in place, `numbers` replaced.

    `states` of the stretch's length by name, `numbers` whatever else the optimizer keeps, such as its step.
    States that the optimizer makes anew are in `states` afterwards.
    """

    group: int
    master: Tensor
    gradient: Tensor  # in the master's dtype, with every factor in it
    states: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


class Rule:
    """A twin of the user's optimizer, which shares nothing that changes: it may step in another thread.

    Its options are those of the moment when it was made. Gradients are given with all factors in them.
    """

    def __init__(self, optimizer: Any, options: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.options = [_frozen(group) for group in optimizer.param_groups] if options is None else options
        self._kind = type(optimizer)
        self._attributes = dict(vars(optimizer))
        step = self._kind.step
        # torch wraps `step` with hooks, which are for the user's steps.
        self._inner = step.__wrapped__ if getattr(step, "hooked", False) else step

    def step(self, given: Sequence[Given]) -> None:
        """One step over these stretches alone."""
        twin: Any = object.__new__(self._kind)
        vars(twin).update(self._attributes)
        twin.state = defaultdict(dict)
        twin.param_groups = [{**options, "params": []} for options in self.options]
        twin._optimizer_step_pre_hooks = OrderedDict()  # a class of one's own may call torch's `step`
        twin._optimizer_step_post_hooks = OrderedDict()
        for name in ("copy_out", "low_precision_grads"):
            if name in self._attributes:
                setattr(twin, name, {})
        if hasattr(twin, "clip_coef"):
            twin.clip_coef = 1.0
        params = []
        for each in given:
            param = nn.Parameter(each.master, requires_grad=True)
            param.grad = each.gradient
            state = each.states | {name: _own(value) for name, value in each.numbers.items()}
            options = self.options[each.group]
            if options.get("fused") or options.get("capturable"):  # torch keeps `step` beside the parameter
                state = {
                    name: value.to(each.master.device) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
            if state:
                twin.state[param] = state
            twin.param_groups[each.group]["params"].append(param)
            params.append(param)
        with torch.no_grad():
            self._inner(twin)
        for each, param in zip(given, params, strict=True):
            numbers: dict[str, Any] = {}
            for name, value in twin.state.get(param, {}).items():
                if not (isinstance(value, Tensor) and value.dim() > 0 and value.shape == param.shape):
                    numbers[name] = value
                elif name not in each.states:
                    each.states[name] = value
                elif each.states[name].data_ptr() != value.data_ptr():
                    each.states[name].copy_(value)
            each.numbers = numbers

    def save(self) -> list[dict[str, Json]]:
        """The options as JSON."""
        return [
            {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
            for group in self.options
        ]


def loaded_rule(optimizer: Any, saved: Sequence[Mapping[str, Any]]) -> Rule:
    """With the options that were saved, in the types that the optimizer's have now."""
    options = []
    for group, old in zip(optimizer.param_groups, saved, strict=True):
        now = _frozen(group)
        for name, value in old.items():
            like = now.get(name)
            if isinstance(like, Tensor):
                now[name] = torch.full_like(like, value)
            else:
                now[name] = tuple(value) if isinstance(like, tuple) else value
        options.append(now)
    return Rule(optimizer, options)


def refuse_rule(optimizer: Optimizer, cut: str) -> None:
    """Raises ValueError for an optimizer whose rule cannot be applied to some elements of a parameter."""
    if cut != "flat" or hasattr(optimizer, "optimizers"):
        raise ValueError(
            f"{type(optimizer).__name__} with zenflow=ZenFlow(...): some elements of a parameter are updated "
            "now and some later, so allowed is one optimizer whose rule looks at each element alone (AdamW, "
            "SGD, FusedAdamW, ...; `elementwise = True` on a class of your own); leave zenflow out"
        )


def _frozen(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _own(value) for name, value in group.items() if name not in ("params", SAVED)}


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
