"""Training state out of device memory between phases, under DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_core.train.engine import Engine

# DeepSpeed's names of training state -> ours
_STATES: Mapping[str, str] = {
    "optim_states": "moments",
    "hp_params": "masters",
    "lp_params": "params",
    "lp_grads": "grads",
    "contiguous_grad_buffer": "grads",
}


class PhasedEngine(Engine):
    """Engine, with DeepSpeed's `offload_states` and `reload_states`."""

    def offload_states(  # type: ignore[override]  # the names are DeepSpeed's
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> int:
        """Engine's `offload_states` under DeepSpeed's names (None: all); `device` also "nvme:<folder>".

        Host memory is pinned where the device is a GPU, and the call returns when everything has left:
        `pin_memory` and `non_blocking` are accepted and change nothing. Raises ValueError for other names.
        """
        names = [str(getattr(state, "value", state)) for state in (_STATES if include is None else include)]
        unknown = [name for name in names if name not in _STATES]
        if unknown:
            raise ValueError(f"include={unknown[0]!r}; allowed: {', '.join(_STATES)}")
        to = str(getattr(device, "value", device))
        kinds = dict.fromkeys(_STATES[name] for name in names)
        return super().offload_states(*kinds, to="host" if to == "cpu" else to) if kinds else 0

    def reload_states(self, non_blocking: bool = False) -> int:  # type: ignore[override]
        """Everything comes back before this returns."""
        return super().reload_states()

    def empty_partition_cache(self) -> None:
        """Whole parameters of stage 3 that wait for their next use go."""
        self.owner.let_whole_go()
