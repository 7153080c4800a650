"""Training state that is elsewhere between two phases: which, who took it, and the error for its users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_core.state.absent import ABOUT
from ds_core.state.store import Kind

_NAMES: dict[Kind, str] = {"param": "params", "grad": "grads", "master": "masters", "moment": "moments"}
_NAME = "_ds_parked"


class ParkedStateError(RuntimeError):
    """Parked training state was used before it was brought back."""


class ParkingLot(Protocol):
    """Takes parts of an owner's training state out of its device's memory and brings them back."""

    def park(self, kinds: Sequence[str], to: Any) -> int:
        """Bytes that left the device's memory."""
        ...

    def reload(self, kinds: Sequence[str]) -> int:
        """Bytes that came back."""
        ...


class Parked:
    """Which kinds of one owner's state are parked, and where. `lot`: who parked them."""

    def __init__(self) -> None:
        self.where: dict[Kind, str] = {}
        self._lot: ParkingLot | None = None

    def need(self, what: str, *kinds: Kind) -> None:
        """`what` is about to use these kinds. Raises ParkedStateError naming those that are parked."""
        if not self.where:
            return
        gone = [f"{_NAMES[kind]} ({self.where[kind]})" for kind in kinds if kind in self.where]
        if gone:
            raise ParkedStateError(
                f"{what} needs {', '.join(gone)}, which are parked: call reload_states() first"
            )

    def lot(self, owner: Any) -> ParkingLot:
        """The one lot of this owner. Raises LookupError where no installed package brings one."""
        if self._lot is None:
            made = [entry.load() for entry in entry_points(group="ds.parking", name="lot")]
            if not made:
                raise LookupError("parking training state comes with ds-offload (pip install ds-offload)")
            self.keep(made[0](owner))
        assert self._lot is not None
        return self._lot

    @property
    def has_lot(self) -> bool:
        return self._lot is not None

    def keep(self, lot: ParkingLot) -> None:
        self._lot = lot


class Parkable:
    """What an owner of units is to a parking lot, beside its units."""

    parked: Parked

    def copies(self) -> Sequence[Tensor]:
        """Values of parameters that are kept on the device beside the units' own."""
        return ()

    def let_whole_go(self) -> None:
        """Whole copies that wait for their next use go, where parameters are cut. Not during a backward."""


def _refuse(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func in ABOUT:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    values = [*args, *kwargs.values()]
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    names = [str(getattr(item, _NAME)) for item in flat if isinstance(item, ParkedTensor | ParkedParameter)]
    what = getattr(func, "__name__", str(func))
    raise ParkedStateError(f"{', '.join(names)}: parked, so {what} cannot use it; call reload_states() first")


class ParkedTensor(Tensor):
    """What a tensor's class is while its bytes are parked: it says what it is, and refuses all else."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _refuse(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{getattr(self, _NAME)} ({tuple(self.shape)}, {self.dtype}): parked"


class ParkedParameter(nn.Parameter):
    """The same of a parameter."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _refuse(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{getattr(self, _NAME)} ({tuple(self.shape)}, {self.dtype}): parked"


_CLASSES: dict[type, type] = {Tensor: ParkedTensor, nn.Parameter: ParkedParameter}


def is_parked(tensor: Tensor) -> bool:
    return isinstance(tensor, ParkedTensor | ParkedParameter)


class HiddenView:
    """A tensor whose memory goes away under it: the same object, which meanwhile shows one NaN and refuses.

    [Note: graphs over parked parameters] While hidden a tensor counts as written, so that a backward which
    saved it raises instead of reading memory that is gone; the count goes back when it is shown.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._tensor, self._kept_class = tensor, type(tensor)
        self._storage = tensor.untyped_storage()
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()
        filler = float("nan") if tensor.dtype.is_floating_point else 0
        tensor.data = torch.full((), filler, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        self._bump(1)
        if self._kept_class in _CLASSES:  # one of a class of its own keeps it, and shows NaN
            setattr(tensor, _NAME, name)
            tensor.__class__ = _CLASSES[self._kept_class]

    def show(self) -> None:
        """The memory is back."""
        tensor = self._tensor
        if is_parked(tensor):
            tensor.__class__ = self._kept_class
            delattr(tensor, _NAME)
        with torch.no_grad():
            offset, shape, stride = self._place
            tensor.data = tensor.new_empty(0).set_(self._storage, offset, shape, stride)
        self._bump(-1)

    def _bump(self, step: int) -> None:
        if isinstance(self._tensor, nn.Parameter):
            version = self._tensor._version + step
            torch._C._autograd._unsafe_set_version_counter((self._tensor,), (version,))
