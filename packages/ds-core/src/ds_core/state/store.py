"""Who keeps named tensors between uses: the protocol, and the plain store where they stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Lease(Protocol):
    """Borrowed bytes: `tensor` is valid inside the `with`; leaving it gives them back, written if `dirty`."""

    tensor: Tensor
    dirty: bool

    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...


class Store(Protocol):
    """Owns named 1-D tensors in some tier: device, pinned host, NVMe, or a policy over several."""

    def create(self, key: str, init: Tensor) -> None: ...
    def prefetch(self, keys: Sequence[str]) -> None: ...
    def lease(self, key: str, device: torch.device) -> Lease: ...
    def drop(self, key: str) -> None: ...
    def bytes_by_tier(self) -> dict[str, int]: ...
    def flush(self) -> None: ...


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

    resident = True

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def create(self, key: str, init: Tensor) -> None:
        """Take over `init`, without a copy. Raises ValueError when the key is taken."""
        if key in self._tensors:
            raise ValueError(f"the store already holds {key!r}; one store serves one model")
        self._tensors[key] = init

    def prefetch(self, keys: Sequence[str]) -> None:
        """Nothing to do: it is all here."""

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

    def flush(self) -> None:
        """Nothing to do: there is no slower tier."""
