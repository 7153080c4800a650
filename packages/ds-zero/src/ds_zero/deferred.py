"""Building a model without its parameters' bytes: they go to the meta device, what is written is noted."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from time import monotonic_ns
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ds_zero.load_sources import Held, Source

# Writes that leave nothing of what was there before, when they go to a whole parameter.
_OVERWRITES = frozenset(
    f"aten::{name}"
    for name in ("uniform_", "normal_", "zero_", "fill_", "copy_", "exponential_", "log_normal_", "eye")
)
_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_ASKING: dict[Any, Any] = {
    fill.__code__: fill
    for name in ("_no_grad_trunc_normal_", "orthogonal_", "dirac_", "sparse_")
    if (fill := getattr(nn.init, name, None)) is not None
}


@dataclass(frozen=True, slots=True)
class _Ref:
    """A view of a parameter, in place of the meta tensor that a noted operation was given."""

    recipe: Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, repr=False)
class _Write:
    """An operation that wrote to parameters, or `makes` what another one needs.

    `number`: when its context began, its place in there.
    """

    number: tuple[int, int]
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    makes: tuple[Recipe | None, ...] = ()

    def refs(self) -> list[_Ref]:
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, _Ref)]


@dataclass(eq=False, slots=True)
class Recipe:
    """How a meta tensor comes to its values: those of `source`, and then `writes` in their order."""

    source: Source | None
    version: int = 0  # of the parameter after the last write that was noted
    shared: bool = False  # every rank has the same source (a file), so each may read its part alone
    writes: list[_Write] = field(default_factory=list)
    unknown: str | None = None  # why the values cannot be had from here
    made: tuple[Any, Any] | None = None  # size and stride, if an operation made it on the way to a parameter

    def copy(self, version: int) -> Recipe:
        """The same steps for another parameter."""
        made = Recipe(self.source, version, self.shared, unknown=self.unknown)

        def moved(value: Any) -> Any:
            mine = isinstance(value, _Ref) and value.recipe is self
            return _Ref(made, value.size, value.stride, value.offset) if mine else value

        made.writes = [
            _Write(w.number, w.func, tree_map(moved, w.args), tree_map(moved, w.kwargs)) for w in self.writes
        ]
        return made


# meta parameter -> its recipe; sharding, or the parameter's end, forgets it.
_RECIPES: WeakIdKeyDictionary = WeakIdKeyDictionary()


class MetaParameter(nn.Parameter):
    """A parameter without bytes whose recipe goes with it when its module is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        made = memo[id(self)] = meta_twin(self)
        recipe = recipe_of(self)
        if recipe is not None:
            _RECIPES[made] = recipe.copy(made._version)
        return made


def recipe_of(param: Tensor) -> Recipe | None:
    found = _RECIPES.get(param)  # type: ignore[no-untyped-call]
    assert found is None or isinstance(found, Recipe)
    return found


def set_source(param: nn.Parameter, source: Source) -> None:
    """A meta parameter's values are these, on every rank, whatever was written before."""
    _RECIPES[param] = Recipe(source, param._version, shared=True)


def leave_to_module(param: nn.Parameter, why: str) -> None:
    """A meta parameter of which nothing is known: its module's own `reset_parameters()` is to fill it."""
    if recipe_of(param) is None:
        _RECIPES[param] = Recipe(None, param._version, unknown=why)


def shared_source(param: Tensor) -> Source | None:
    """Where any rank reads its part of a meta parameter on its own; None for all other parameters."""
    recipe = recipe_of(param) if param.is_meta else None
    return recipe.source if recipe is not None and recipe.shared and not recipe.writes else None


def forget_recipe(param: Tensor) -> None:
    """The parameter has its values: what they came from may go."""
    _RECIPES.pop(param, None)  # type: ignore[no-untyped-call]


def meta_twin(param: Tensor) -> MetaParameter:
    """The same parameter without bytes, with the attributes that others have set on it."""
    with _disable_current_modes():
        empty = torch.empty(param.shape, dtype=param.dtype, device="meta")
        twin = MetaParameter(empty, requires_grad=param.requires_grad)
    keep_attributes(param, twin)
    return twin


def keep_attributes(old: Tensor, new: Tensor) -> None:
    """What others have set on a parameter (`_is_hf_initialized`, `allreduce`) stays on its replacement."""
    vars(new).update({key: value for key, value in vars(old).items() if key not in ("source", "_is_param")})


@contextlib.contextmanager
def materialize(*, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; sharding fills them, unit by unit.

    What constructors write to parameters (`nn.init`, `fill_`, a scaled second initialisation) is noted and
    done when `Zero.shard` or `shard` gives a unit its bytes: no rank ever has more than one unit whole.
    Random numbers are drawn then, in the order of the units, and rank 0's count: after the same
    `torch.manual_seed` before sharding, values are the same at every world size and stage. They are drawn
    from the same distributions as without this, but are not the same numbers.
    Buffers are computed as always. `dtype` is for floating parameters that the constructors make.
    """
    modes = _get_current_dispatch_mode_stack()
    if not enabled or any(isinstance(mode, _Noting) for mode in modes):
        yield
        return
    noting = _Noting(dtype)
    handle = register_module_parameter_registration_hook(noting.registered)  # type: ignore[arg-type]
    try:
        with noting, _AskedByInit(noting):
            yield
    finally:
        handle.remove()
        noting.end()


class _AskedByInit(TorchFunctionMode):
    """Some of torch's initialisers ask whether a tensor is on the meta device, and then do nothing.

    Their steps depend on the values they draw, so the call is noted as a whole.
    """

    def __init__(self, noting: _Noting) -> None:
        super().__init__()
        self._noting = noting

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if result is True and func == _IS_META:
            asking = sys._getframe(1)
            fill = _ASKING.get(asking.f_code)
            if fill is not None:
                names = list(inspect.signature(fill).parameters)[1:]
                self._noting.fills(fill, args[0], {name: asking.f_locals[name] for name in names})
        return result


class _Noting(TorchDispatchMode):
    """Turns registered parameters into meta ones and notes every operation that writes to one."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._began, self._numbers = monotonic_ns(), count()
        self._twins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real parameter -> its meta twin
        self._written: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its recipe
        # storage -> what it would hold; the weak reference keeps the address from being used again
        self._storages: dict[int, tuple[StorageWeakRef, weakref.ref[nn.Parameter] | Recipe]] = {}

    def registered(self, module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        """torch's hook: what is registered in place of `param`."""
        if param.is_meta:
            self._follow(param)
            return None
        if type(param) is not nn.Parameter:
            return None  # uninitialised (lazy modules), quantised: not ours to take apart
        twin = self._twins.get(param)  # type: ignore[no-untyped-call]
        if twin is None:
            twin = meta_twin(param)
            if self._dtype is not None and param.is_floating_point():
                twin.data = twin.data.to(self._dtype)
            _RECIPES[twin] = Recipe(Held(param.detach()), twin._version)
            self._twins[param] = twin
            self._follow(twin)
        assert isinstance(twin, nn.Parameter)
        return twin

    def end(self) -> None:
        """What is written from here on is noticed as lost (autograd counts a write after it was noted)."""
        for param, recipe in self._written.items():  # type: ignore[no-untyped-call]
            recipe.version = param._version

    def _follow(self, param: nn.Parameter) -> None:
        storage = param.untyped_storage()
        self._storages[storage._cdata] = _weak(storage), weakref.ref(param)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        written = [tensor for tensor in _written(func, args, options) if tensor.is_meta]
        targets = [(tensor, *found) for tensor in written if (found := self._find(tensor)) is not None]
        result = func(*args, **options)
        outputs = tree_flatten(result)[0]
        views = any(value.alias_info is not None for value in func._schema.returns)
        makes = tuple(
            Recipe(None, made=(tuple(out.shape), out.stride()))
            if isinstance(out, Tensor) and out.is_meta and not views
            else None
            for out in outputs
        )
        if not targets and not any(makes):
            return result
        number = (self._began, next(self._numbers))
        mapped_args, mapped_options = tree_map(self._reference, (tuple(args), options))
        write = _Write(number, func, mapped_args, mapped_options, makes)
        for out, recipe in zip(outputs, makes, strict=True):
            if recipe is not None:
                storage = out.untyped_storage()
                self._storages[storage._cdata] = _weak(storage), recipe
                recipe.writes.append(write)
        for tensor, param, recipe in targets:
            self._note(write, tensor, param, recipe)
        return result

    def fills(self, fill: Any, tensor: Tensor, options: dict[str, Any]) -> None:
        """`fill(tensor, **options)`, one of torch's initialisers, is to be done."""
        with _disable_current_modes():
            found = self._find(tensor)
            if found is None:
                return
            number = (self._began, next(self._numbers))
            self._note(_Write(number, fill, (self._reference(tensor),), options), tensor, *found)

    def _note(self, write: _Write, tensor: Tensor, param: nn.Parameter | None, recipe: Recipe) -> None:
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and tensor.nbytes == storage.nbytes()
        overwrites = write.func in _ASKING.values() or write.func._schema.name in _OVERWRITES
        if param is not None and whole and len(write.refs()) == 1 and overwrites:
            recipe.source, recipe.unknown = None, None
            recipe.writes.clear()
        elif param is not None and recipe.source is None and not recipe.writes:
            recipe.unknown = f"{write.func} wrote to it before anything had filled it"
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_flatten(write.args)[0]):
            recipe.unknown = f"{write.func} gave it values from the meta device"
        recipe.writes.append(write)
        if param is not None:
            self._written[param] = recipe

    def _find(self, tensor: Tensor) -> tuple[nn.Parameter | None, Recipe] | None:
        """What a meta tensor's bytes would hold: a parameter and its recipe, or what was made on the way."""
        storage = tensor.untyped_storage()._cdata
        entry = self._storages.get(storage)
        known = entry[1] if entry is not None else None
        param = tensor if isinstance(tensor, nn.Parameter) else None
        if param is None and isinstance(known, weakref.ref):
            param = known()
        if param is None:  # a copy, or one whose dtype was changed: its bytes would be elsewhere now
            params: Iterable[nn.Parameter] = list(_RECIPES)
            param = next((p for p in params if p.untyped_storage()._cdata == storage), None)
        if param is None:
            return (None, known) if isinstance(known, Recipe) else None
        self._follow(param)
        recipe = recipe_of(param)
        if recipe is None:
            recipe = Recipe(None)
            _RECIPES[param] = recipe
        return param, recipe

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_meta:
            return value.detach().clone()
        found = self._find(value)
        if found is None:
            return value
        return _Ref(found[1], tuple(value.shape), value.stride(), int(value.storage_offset()))


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return found


def replay(fresh: Sequence[tuple[Recipe, Tensor]]) -> None:
    """Give real tensors the values that their recipes say, all operations in the order they were made in.

    Raises ValueError when one of them also needs a parameter that is not among them.
    """
    real = {id(recipe): tensor for recipe, tensor in fresh}
    steps: dict[tuple[int, ...], _Write] = {}
    for order, (recipe, tensor) in enumerate(fresh):
        if recipe.source is not None:
            recipe.source.read(0, tensor.detach().view(-1))
        _collect(recipe, order, steps, set())
    device = fresh[0][1].device if fresh else torch.device("cpu")
    with torch.no_grad():
        for number in sorted(steps):
            step = steps[number]
            args, kwargs = tree_map(partial(_resolve, real, device), (step.args, step.kwargs))
            outputs = tree_flatten(step.func(*args, **kwargs))[0]
            for made, output in zip(step.makes, outputs, strict=False):
                if made is not None:
                    real[id(made)] = output


def _collect(recipe: Recipe, order: int, steps: dict[tuple[int, ...], _Write], seen: set[int]) -> None:
    """All steps that a recipe needs, those on the way to them included.

    A step for several parameters is done once; a copied parameter has its own of the same number.
    """
    if id(recipe) in seen:
        return
    seen.add(id(recipe))
    for step in recipe.writes:
        refs = step.refs()
        alone = not step.makes and {id(ref.recipe) for ref in refs} == {id(recipe)}
        steps[(*step.number, order if alone else -1)] = step
        for ref in refs:
            if ref.recipe.made is not None:
                _collect(ref.recipe, order, steps, seen)


def _resolve(real: Mapping[int, Tensor], device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "meta":
        return device
    if not isinstance(value, _Ref):
        return value
    tensor = real.get(id(value.recipe))
    if tensor is None:
        raise ValueError(
            "a parameter was initialised from another one that is in another unit: build the model outside "
            "of materialize(), or initialise them apart"
        )
    if value.recipe.made == (value.size, value.stride) and not value.offset:
        return tensor  # a decomposition may lay out its results in another way than its meta version
    return tensor.as_strided(value.size, value.stride, tensor.storage_offset() + value.offset)
