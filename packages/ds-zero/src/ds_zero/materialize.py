"""Meta-device models become real one unit at a time, so that no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_core.state.unit import FlatUnit

Initializer = Callable[[nn.Module], None]


def materialize_unit(
    model: nn.Module, unit: FlatUnit, device: torch.device, initializer: Initializer | None
) -> None:
    """Give the unit's meta parameters bytes and values, in place of the meta ones in their modules.

    Values come from `initializer(module)`, or from the module's own `reset_parameters()`. Parameters of the
    same module that belong to another unit are shielded. Rank 0's values win afterwards, so ranks need not
    share a seed. On a meta device (a fake world) nothing is to be done.
    Raises ValueError naming the module that has neither, and buffers that nobody fills.
    """
    if device.type == "meta":
        return
    wanted = {id(param): index for index, param in enumerate(unit.params) if param.is_meta}
    if not wanted:
        return
    fresh: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
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
            _initialize(module, module_name, mine, device, initializer)
    unit.params = [fresh.get(index, param) for index, param in enumerate(unit.params)]


def _initialize(
    module: nn.Module, name: str, mine: list[str], device: torch.device, initializer: Initializer | None
) -> None:
    shown = name or type(module).__name__
    for buffer_name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            if initializer is None and not type(module).__module__.startswith("torch.nn"):
                raise ValueError(
                    f"buffer {shown}.{buffer_name} is on the meta device and nothing says how to fill it: "
                    "build it outside of `torch.device('meta')`, or pass initializer=fn that fills it"
                )
            module._buffers[buffer_name] = torch.empty_like(buffer, device=device)
    fill = initializer
    if fill is None:
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"module {shown} ({type(module).__name__}) is on the meta device and has no "
                "reset_parameters(): add one, or pass initializer=fn(module)"
            )

        def fill(module: nn.Module) -> None:
            reset()

    shielded = {key: p for key, p in module._parameters.items() if p is not None and key not in mine}
    for key, param in shielded.items():
        module._parameters[key] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    try:
        with torch.no_grad():
            fill(module)
    finally:
        module._parameters.update(shielded)
