"""DeepSpeed's names for modules that are never split: marks that are read when units are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from ds_core.state.units import LEAF_MARK


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type[nn.Module] | str]
) -> list[nn.Module]:
    """Mark every module of these classes (or class names) as one unit; before sharding. Returns them.

    Rarely needed: blocks and containers of experts are units already. `Zero(leaves=(...))` does it by name.
    Raises ValueError when the model has none.
    """
    kinds = tuple(kind for kind in leaf_module_classes if not isinstance(kind, str))
    names = {kind for kind in leaf_module_classes if isinstance(kind, str)}
    return _mark(model, lambda _, m: isinstance(m, kinds) or type(m).__name__ in names, leaf_module_classes)


def set_z3_leaf_modules_by_name(model: nn.Module, leaf_module_names: Sequence[str]) -> list[nn.Module]:
    """The same by full module names."""
    return _mark(model, lambda name, _: name in leaf_module_names, leaf_module_names)


def set_z3_leaf_modules_by_suffix(model: nn.Module, suffixes: Sequence[str]) -> list[nn.Module]:
    """The same by the ends of full module names."""
    return _mark(model, lambda name, _: name.endswith(tuple(suffixes)), suffixes)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type[nn.Module]]
) -> list[nn.Module]:
    """Take the marks of these classes away again; before sharding. Returns the modules that had one."""
    found = [
        module for module in get_z3_leaf_modules(model) if isinstance(module, tuple(leaf_module_classes))
    ]
    for module in found:
        delattr(module, LEAF_MARK)
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that is marked."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Is this module marked?"""
    return cast(bool, getattr(model, LEAF_MARK, False))


def _mark(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool], asked: Sequence[object]
) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if wanted(name, module)]
    if not found:
        raise ValueError(f"the model has no module of {list(asked)}; look at model.named_modules()")
    for module in found:
        setattr(module, LEAF_MARK, True)
    return found
