"""A lease on a tensor that lives elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.home import Home


class MovedLease:
    """`tensor` is the home itself where the device can use it, else a copy that goes back if `dirty`."""

    def __init__(self, home: Home, device: torch.device) -> None:
        home.settle()
        self._home = home
        self.tensor: Tensor = home.tensor.to(device)
        self.dirty = False

    def __enter__(self) -> MovedLease:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.dirty and self.tensor is not self._home.tensor:
            self._home.tensor.copy_(self.tensor)
        self._home.forget()
