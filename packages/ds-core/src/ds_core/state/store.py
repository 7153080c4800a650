"""Who keeps named tensors between uses: the protocols, and the plain store where they stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ds_core.ground.ticket import Ticket
from ds_core.state.layout import BucketLayout

Kind = Literal["param", "master", "grad", "moment"]


class Lease(Protocol):
    """Borrowed bytes: `tensor` is valid inside the `with`; leaving it gives them back, written if `dirty`."""

    tensor: Tensor
    dirty: bool

    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...


class Store(Protocol):
    """Owns named 1-D tensors in some tier: device, host, disk, or a policy over several.

    Keys are "<unit>/param", "<unit>/master", "<unit>/grad" or "<unit>/<state of the optimizer>".
    `features`: what using it means, in the words of `ds_core.limits`. `away`: how to reach tensors that live
    elsewhere than where they are used; None when none does.
    """

    @property
    def features(self) -> frozenset[str]: ...
    @property
    def away(self) -> Away | None: ...

    def create(self, key: str, init: Tensor) -> Tensor:
        """Take over `init`; returns its home: the live bytes, plain to read and write, wherever they are."""
        ...

    def home(self, key: str) -> Tensor: ...
    def lease(self, key: str, device: torch.device) -> Lease: ...
    def drop(self, key: str) -> None: ...
    def bytes_by_tier(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class Shares:
    """Which part of each kind of state takes none of a device's memory, and the bytes of it that the buffers
    take through which state travels.
    """

    params: float = 0.0
    grads: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    buffers: int = 0


class HasGradient(Protocol):
    """What is asked of a unit whose gradient leaves: a FlatUnit."""

    key: str
    layout: BucketLayout
    device: torch.device
    grad_dtype: torch.dtype
    gradient: Tensor | None


class Described(Protocol):
    """What a store may ask of a unit whose tensors it is about to be given: a FlatUnit."""

    key: str
    layout: BucketLayout
    rank: int
    dtype: torch.dtype
    trainable: bool

    @property
    def shard_key(self) -> str | None: ...


class Away(Protocol):
    """Tensors that live elsewhere: the fast ways there and back, beside the plain one through their homes."""

    def shares(self, device: torch.device) -> Shares:
        """What this saves of the device's memory. A CPU's is the host's."""
        ...

    def expect(self, unit: Described) -> None:
        """The unit's tensors come next. Raises ValueError where they cannot be kept as was asked for."""
        ...

    def apart(self, kind: Kind) -> bool:
        """Does this kind live apart from the memory that computes with it?"""
        ...

    def fetch(self, key: str, out: Tensor) -> Ticket | None:
        """Start filling `out` [numel] with a tensor's bytes; None where its home is as good."""
        ...

    def room(self, unit: HasGradient) -> Tensor | None:
        """Memory [shard_numel] for a gradient of the unit before it leaves, with what it has so far; None if
        it stays.
        """
        ...

    def keep(self, unit: HasGradient, reduced: Tensor, *, final: bool) -> None:
        """The gradient, all of it, leaves: `unit.gradient` is its home from here on.

        `final`: as far as one can tell nothing will be added before the step.
        """
        ...

    def landed(self) -> None:
        """Every gradient that was kept is in its home."""
        ...

    def settle(self) -> None:
        """Everything that was on its way has arrived, updates of an earlier step included: homes are current.

        Collective where updates may come late: the owner publishes them.
        """
        ...

    def paged(self, key: str) -> Callable[[], object] | None:
        """Of a tensor that a file holds: what lets go of its pages that looks brought in."""
        ...

    def steps(self, optimizer: Any) -> Any:
        """How a `ShardedOptimizer` updates what is not here: a `ds_core.train.optim.Elsewhere`."""
        ...


class HeldLease:
    """A lease on bytes that never move."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.dirty = False

    def __enter__(self) -> HeldLease:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class DeviceStore:
    """Keeps every tensor where it was created. Leases cost nothing and may be held for ever."""

    features: frozenset[str] = frozenset()
    away: None = None

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def create(self, key: str, init: Tensor) -> Tensor:
        """Take over `init`, without a copy. Raises ValueError when the key is taken."""
        if key in self._tensors:
            raise ValueError(f"the store already holds {key!r}; one store serves one model")
        self._tensors[key] = init
        return init

    def home(self, key: str) -> Tensor:
        return self._tensors[key]

    def lease(self, key: str, device: torch.device) -> HeldLease:
        """The tensor itself. Raises ValueError when it lives on another device."""
        tensor = self._tensors[key]
        if tensor.device.type != device.type:
            raise ValueError(f"{key!r} lives on {tensor.device} and this store moves nothing to {device}")
        return HeldLease(tensor)

    def drop(self, key: str) -> None:
        """Forget a tensor; its key is free again."""
        del self._tensors[key]

    def bytes_by_tier(self) -> dict[str, int]:
        return {"device": sum(tensor.nbytes for tensor in self._tensors.values())}
