"""A parameter whose bytes are not here: it answers what it is, and refuses to be read or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTES = """
    shape dtype device layout ndim names itemsize nbytes requires_grad grad grad_fn is_leaf retains_grad
    is_cpu is_cuda is_meta is_mps is_xpu is_sparse is_quantized is_nested is_mkldnn _backward_hooks
    _post_accumulate_grad_hooks _version
"""
_METHODS = """
    size dim ndimension numel nelement element_size stride get_device is_floating_point is_complex is_signed
    is_same_size requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad __len__ __hash__
    new_empty new_zeros new_ones new_full new_tensor untyped_storage
"""
_FUNCTIONS = """
    empty_like zeros_like ones_like full_like rand_like randn_like is_floating_point is_complex numel
"""


def _about() -> Iterator[Any]:
    """What needs no values."""
    for name in _ATTRIBUTES.split():
        if (found := getattr(Tensor, name, None)) is not None:
            yield found.__get__
    for name in ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks"):
        yield getattr(Tensor, name).__set__
    grad: Any = Tensor.grad
    yield grad.__delete__
    for name in _METHODS.split():
        yield getattr(Tensor, name)
    for name in _FUNCTIONS.split():
        yield getattr(torch, name)


ABOUT = frozenset(_about())
_NAME, _BRING = "_ds_name", "_ds_bring"


class AbsentParameterError(RuntimeError):
    """A sharded parameter was used where it is not whole."""


class AbsentParameter(nn.Parameter):
    """What a parameter's class is while its unit is let go; it turns back when the unit arrives.

    Shape, dtype, gradient and the like are the logical ones. Reading or writing values brings the unit where
    the owner can do that (inside a forward or backward, where all ranks come to the same line), else raises
    AbsentParameterError with the parameter's name and what to do.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        values = [*args, *(kwargs or {}).values()]
        if func.__name__ != "__set__" and all(getattr(param, _BRING)() for param in _absent_in(values)):
            return func(*args, **(kwargs or {}))
        raise AbsentParameterError(_refusal(func, values))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        name = getattr(self, _NAME, "?")
        return f"Parameter {name} ({tuple(self.shape)}, {self.dtype}): sharded, not whole here"

    def __reduce_ex__(self, proto: Any) -> Any:
        raise AbsentParameterError(_refusal(self.__reduce_ex__, [self]))


def _absent_in(values: list[Any]) -> list[AbsentParameter]:
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, AbsentParameter)]


def _refusal(func: Any, values: list[Any]) -> str:
    names = [getattr(item, _NAME, "?") for item in _absent_in(values)]
    what = getattr(func, "__name__", str(func))
    if what in ("__get__", "__set__"):
        what = f"its attribute {getattr(getattr(func, '__self__', None), '__name__', '?')!r}"
    return (
        f"parameter {', '.join(names) or '?'} is sharded and not whole here, so {what} cannot use it: "
        "call full_tensor(param) for a copy, or work inside `with ds_zero.gather(param):` "
        "(with write=0 to keep what rank 0 writes); all ranks must do so together"
    )


def mark_absent(param: nn.Parameter, name: str, bring: Callable[[], bool]) -> None:
    """Turn a plain parameter; one of a class of its own keeps it, and shows NaN instead of raising.

    `bring` makes it whole, or says that it cannot now; it must not keep the parameter's unit alive.
    """
    if type(param) is nn.Parameter:
        setattr(param, _NAME, name)
        setattr(param, _BRING, bring)
        param.__class__ = AbsentParameter


def rename_absent(param: nn.Parameter, name: str) -> None:
    """The name under which an absent parameter refuses; nothing to do for any other."""
    if type(param) is AbsentParameter:
        setattr(param, _NAME, name)


def mark_present(param: nn.Parameter) -> None:
    if type(param) is AbsentParameter:
        param.__class__ = nn.Parameter  # type: ignore[assignment]
        delattr(param, _NAME)
        delattr(param, _BRING)
