"""Meta-device models become real one unit at a time, so that no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ds_core.state.store import Store
from ds_core.state.unit import FlatUnit
from ds_zero.deferred import forget_recipe, keep_attributes, recipe_of, replay, shared_source

Initializer = Callable[[nn.Module], None]


def refuse_unfillable(model: nn.Module, initializer: Initializer | None) -> None:
    """Raises ValueError naming the first meta parameter or buffer that nothing can fill, before any is."""
    noted = any(recipe_of(param) is not None for param in model.parameters())
    for name, module in model.named_modules():
        shown = f"{name or 'the root'} ({type(module).__name__})"
        for key, param in module._parameters.items():
            if param is not None and param.is_meta:
                _refuse_param(shown, key, param, _can_reset(module), initializer)
                if noted and recipe_of(param) is None and initializer is None:
                    raise ValueError(
                        f"parameter {key!r} of module {shown} was put on the meta device by something that "
                        "forgot its values (adapters follow the device of what they adapt): add it inside "
                        "`with ds_zero.materialize():`, or pass initializer=fn(module)"
                    )
        for key, buffer in module._buffers.items():
            own = type(module).__module__.startswith("torch.nn") and _can_reset(module)
            if buffer is not None and buffer.is_meta and not own and initializer is None:
                raise ValueError(
                    f"buffer {key!r} of module {shown} is on the meta device and nothing says how to "
                    "fill it: build it inside `with ds_zero.materialize():` instead of "
                    "`torch.device('meta')`, or pass initializer=fn(module)"
                )


def _refuse_param(
    shown: str, key: str, param: Tensor, can_reset: bool, initializer: Initializer | None
) -> None:
    recipe = recipe_of(param)
    if recipe is not None and param._version != recipe.version:
        raise ValueError(
            f"parameter {key!r} of module {shown} has no bytes yet and was written, so the write is lost: "
            "write inside `with ds_zero.materialize():`, or after sharding inside `ds_zero.gather`"
        )
    if initializer is not None or can_reset or (recipe is not None and recipe.unknown is None):
        return
    why = "" if recipe is None else f" ({recipe.unknown})"
    raise ValueError(
        f"module {shown} is on the meta device and has no reset_parameters(){why}: add one, build the model "
        "inside `with ds_zero.materialize():`, or pass initializer=fn(module)"
    )


def refuse_meta(model: nn.Module) -> None:
    """Raises ValueError naming a parameter without bytes, where every rank keeps all of them."""
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and stage=0 keeps everything whole on every rank: build or "
                "load the model as usual, or take stage=1, which keeps parameters whole too"
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
    model: nn.Module,
    unit: FlatUnit,
    device: torch.device,
    initializer: Initializer | None,
    *,
    files: bool = False,
) -> Tensor | None:
    """Give the unit's meta parameters bytes and values, in place of the meta ones in their modules.

    They are views of one buffer [numel] in the master's dtype, which is returned where it holds all of the
    unit.

    Values come from `initializer(module)`, else from what was noted when the model was built inside
    `materialize()`, else from the module's own `reset_parameters()`. Parameters of the same module that
    belong to another unit are shielded. Rank 0's values win afterwards, so ranks need not share a seed.
    Those that each rank can read from a file are left to `read_unit`, unless `files`. On a meta device (a
    fake world) nothing is to be done.
    """
    wanted = [p.is_meta and (files or shared_source(p) is None) for p in unit.params]
    if device.type == "meta" or not any(wanted):
        return None
    flat = torch.zeros(unit.layout.numel, dtype=unit.master_dtype, device=device)
    fresh: dict[int, nn.Parameter] = {}
    noted: list[tuple[Tensor, nn.Parameter]] = []
    for slot, param, mine in zip(unit.layout.slots, unit.params, wanted, strict=True):
        if not mine:
            continue
        view = flat[slot.start : slot.end].view(slot.shape)
        # `.data`: a write to the buffer or to one of them must not count as a write to the others.
        fresh[id(param)] = nn.Parameter(view.data, requires_grad=param.requires_grad)
        keep_attributes(param, fresh[id(param)])
        recipe = recipe_of(param)
        chosen = initializer is None or shared_source(param) is not None
        if chosen and recipe is not None and recipe.unknown is None:
            noted.append((param, fresh[id(param)]))
    _put(model, unit, fresh)
    replay([(recipe, real) for param, real in noted if (recipe := recipe_of(param)) is not None])
    silent = {id(real) for real in fresh.values()} - {id(real) for _, real in noted}
    filled: set[int] = set()
    for module in model.modules():
        own = {name: id(p) for name, p in module._parameters.items() if id(p) in silent}
        if not filled.issuperset(own.values()):
            _initialize(module, list(own), device, initializer)
        filled.update(own.values())
    for slot, param in zip(unit.layout.slots, unit.params, strict=True):
        if id(param) in silent and param.data_ptr() != flat[slot.start : slot.end].data_ptr():
            flat[slot.start : slot.end].view(slot.shape).copy_(param.detach())  # it was given other bytes
    return flat if all(wanted) else None


def read_unit(
    model: nn.Module, unit: FlatUnit, store: Store, take_from_first: Callable[[Tensor, str], None]
) -> None:
    """Fill the unit's master and shard, each parameter that lies in a file from there, and only this part.

    So all ranks together read a file once. Parameters that are real already become rank 0's. The whole copy,
    where it stays, is still to be gathered, and the unit to be shown.
    """
    fresh: dict[int, nn.Parameter] = {}

    def fill(part: Tensor) -> None:
        for index, param in enumerate(unit.params):
            overlap, source = unit.layout.overlap(unit.rank, index), shared_source(param)
            if source is not None:
                nothing = torch.zeros((), dtype=unit.dtype, device=unit.device).expand(param.shape)
                fresh[id(param)] = nn.Parameter(nothing, requires_grad=param.requires_grad)
                keep_attributes(param, fresh[id(param)])
                if overlap is not None:
                    source.read(overlap.begin, part[slice(*overlap.local)])
                continue
            values = param.detach().to(unit.device, copy=True).contiguous()
            take_from_first(values, unit.about)
            if overlap is not None:
                low, high = overlap.local
                part[low:high].copy_(values.view(-1)[overlap.begin : overlap.begin + high - low])

    unit.begin(store, fill)
    unit.edition += 1
    _put(model, unit, fresh)


def _put(model: nn.Module, unit: FlatUnit, fresh: Mapping[int, nn.Parameter]) -> None:
    """Put new parameters where the meta ones are: in their modules, all of them, and in the unit."""
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None and id(param) in fresh:
                setattr(module, name, fresh[id(param)])  # recurrent modules keep a list of their weights
    unit.params = [fresh.get(id(param), param) for param in unit.params]


def forget_recipes(unit: FlatUnit) -> None:
    """The unit has its values: files may be closed, noted values may go."""
    for _, param in unit.plan.params:
        forget_recipe(param)


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
