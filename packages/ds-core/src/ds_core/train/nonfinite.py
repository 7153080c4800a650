"""Where did the NaN come from? Runs a batch again and names the first module whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is NaN or infinite; no weight was changed."""


def first_nonfinite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """A sentence on the first module that gave something non-finite while `run()` ran the model again.

    None when the forward is finite throughout. Collective where parameters are sharded: every rank runs its
    own batch. Leaves the random state as it was.
    """
    found: list[str] = []
    bad_params: dict[nn.Module, str] = {}
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    handles = []

    def look_before(module: nn.Module, inputs: Any) -> None:
        # Before, since a sharded parameter is let go with its module's forward.
        for key, param in module.named_parameters(recurse=False):
            if not _finite(param):
                bad_params[module] = key

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if found or all(_finite(tensor) for tensor in _tensors(output)):
            return
        name = names[module]
        if module in bad_params:
            found.append(f"module {name} ({type(module).__name__}): its {bad_params[module]} is not finite")
        elif not all(_finite(tensor) for tensor in _tensors(inputs)):
            found.append(f"module {name} ({type(module).__name__}): its input is not finite")
        else:
            found.append(
                f"module {name} ({type(module).__name__}) turns finite inputs into a non-finite output"
            )

    for module in model.modules():
        handles.append(module.register_forward_pre_hook(look_before))
        handles.append(module.register_forward_hook(look))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
