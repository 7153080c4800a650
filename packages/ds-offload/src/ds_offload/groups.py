"""The optimizer's parameter groups, lent to one chunk after another."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ds_core.train.holdings import Piece


class Groups:
    """Each chunk's step starts from the options that the step as a whole found, and leaves no trace in them.

    Left as a context, the groups are as they were: the optimizer's own step, which comes afterwards and finds
    no gradients, does to its options once what a step does.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._options = [dict(group) for group in optimizer.param_groups]
        groups = enumerate(optimizer.param_groups)
        self._group_of = {id(param): index for index, group in groups for param in group["params"]}
        # torch wraps `step` with its profiler's range, which is for the whole step.
        step = type(optimizer).step
        self._inner = step.__wrapped__ if getattr(step, "hooked", False) else step

    def step(self, params: Sequence[tuple[Piece, nn.Parameter]]) -> None:
        """The optimizer's rule over these parameters alone, each in the group of its piece."""
        chosen: list[list[nn.Parameter]] = [[] for _ in self._options]
        for piece, param in params:
            chosen[self._group_of[id(piece.param)]].append(param)
        for group, options, mine in zip(self._optimizer.param_groups, self._options, chosen, strict=True):
            group.update({**options, "params": mine})
        with contextlib.ExitStack() as stack:
            for each in (self._optimizer, *getattr(self._optimizer, "optimizers", ())):
                stack.enter_context(_without_hooks(each))
            self._inner(self._optimizer)

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, *_: object) -> None:
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)


@contextlib.contextmanager
def _without_hooks(optimizer: Any) -> Iterator[None]:
    """Hooks are for the whole step and not for each chunk; a step that calls another's would run them."""
    kept = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = kept
