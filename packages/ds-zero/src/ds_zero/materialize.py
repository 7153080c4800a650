"""Meta-device models become real one unit at a time, so that no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_core.state.unit import FlatUnit

Initializer = Callable[[nn.Module], None]


def refuse_unfillable(model: nn.Module, initializer: Initializer | None) -> None:
    """Raises ValueError naming the first meta module that nothing can fill, before anything is filled."""
    if initializer is not None:
        return
    for name, module in model.named_modules():
        shown = f"{name or 'the root'} ({type(module).__name__})"
        if any(p is not None and p.is_meta for p in module._parameters.values()) and not _can_reset(module):
            raise ValueError(
                f"module {shown} is on the meta device and has no reset_parameters(): add one, or pass "
                "initializer=fn(module)"
            )
        for key, buffer in module._buffers.items():
            own = type(module).__module__.startswith("torch.nn")
            if buffer is not None and buffer.is_meta and not (own and _can_reset(module)):
                raise ValueError(
                    f"buffer {key!r} of module {shown} is on the meta device and nothing says how to "
                    "fill it: build it outside of `torch.device('meta')`, or pass initializer=fn(module)"
                )


def _can_reset(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def materialize_buffers(model: nn.Module, device: torch.device, initializer: Initializer | None) -> None:
    """Fill the buffers of modules without parameters; the others were filled with their parameters."""
    if device.type == "meta":
        return
    for module in model.modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            _initialize(module, [], device, initializer)


def materialize_unit(
    model: nn.Module, unit: FlatUnit, device: torch.device, initializer: Initializer | None
) -> None:
    """Give the unit's meta parameters bytes and values, in place of the meta ones in their modules.

    Values come from `initializer(module)`, or from the module's own `reset_parameters()`. Parameters of the
    same module that belong to another unit are shielded. Rank 0's values win afterwards, so ranks need not
    share a seed. On a meta device (a fake world) nothing is to be done.
    """
    if device.type == "meta":
        return
    wanted = {id(param): index for index, param in enumerate(unit.params) if param.is_meta}
    if not wanted:
        return
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        mine = [name for name, p in module._parameters.items() if p is not None and id(p) in wanted]
        if not mine:
            continue
        first = False
        for name in mine:
            old = module._parameters[name]
            assert old is not None
            index = wanted[id(old)]
            if index not in fresh:
                first = True
                empty = torch.empty(old.shape, dtype=old.dtype, device=device)
                fresh[index] = nn.Parameter(empty, requires_grad=old.requires_grad)
            module._parameters[name] = fresh[index]
        if first:
            _initialize(module, mine, device, initializer)
    unit.params = [fresh.get(index, param) for index, param in enumerate(unit.params)]


def _initialize(
    module: nn.Module, mine: list[str], device: torch.device, initializer: Initializer | None
) -> None:
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[key] = torch.empty_like(buffer, device=device)
    shielded = {key: p for key, p in module._parameters.items() if p is not None and key not in mine}
    for key, param in shielded.items():
        module._parameters[key] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    try:
        with torch.no_grad():
            if initializer is not None:
                initializer(module)
            else:
                reset: Callable[[], object] = module.reset_parameters  # type: ignore[assignment]
                reset()
    finally:
        module._parameters.update(shielded)
