"""The functions people call: a step of any rule over lists of tensors, and taking it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ds_kernels.ops.optim import elementwise, lamb
from ds_kernels.ops.optim.rules import Hyper, LambHyper
from ds_kernels.registry import ready

OPS = {**elementwise.OPS, LambHyper.op: lamb.OP}


@dataclass(frozen=True)
class StepLists:
    """One step's tensors: the i-th of every list belongs to the i-th parameter.

    `states`: the lists that the rule names (`type(hyper).states`), in that order; none for plain SGD.
    `steps` count this step: 1 the first time. Not wanted when empty: `copies` get the new values as well,
    rounded once from fp32; `saved` gets what parameters and states were before (all parameters', then those
    of each state list), for `undo_step_`.
    Shapes: the i-th of every list has the same numel; dtypes fp32, bf16 or fp16, one per list.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    steps: Sequence[int]
    copies: Sequence[Tensor] = ()
    saved: Sequence[Tensor] = ()


@torch.no_grad()
def optim_step_(
    lists: StepLists, hyper: Hyper, *, grad_coef: Tensor | None = None, seed: int | None = None
) -> None:
    """One step, of the rule that `hyper` is, of every tensor in the lists: one pass over memory, LAMB two.

    Gradients are multiplied by `grad_coef` (unscaling and clipping) as they are read. Arithmetic is fp32.
    What is kept in bf16 or fp16 is rounded to nearest even, or with `seed` (a new one each step) what is
    kept in bf16 up or down by chance, right in the mean. A step of views of a part of flat tensors gives
    that part the bits that a step of the whole does, except for LAMB, which needs whole tensors.
    Raises: ValueError naming the argument, its index, what it is and what it should be.
    """
    if hyper.op not in OPS:
        raise ValueError(f"optim_step_: hyper is {hyper!r}; wanted the numbers of one of {', '.join(OPS)}")
    if lists.params:
        ready("optim", lists.params[0].device)
    states = [list(part) for part in lists.states]
    OPS[hyper.op](
        list(lists.params),
        list(lists.grads),
        *states,
        *([] for _ in hyper.states[len(states) :]),
        list(lists.copies),
        list(lists.saved),
        list(lists.steps),
        **asdict(hyper),
        grad_coef=grad_coef,
        seed=seed,
    )


@torch.no_grad()
def undo_step_(lists: StepLists) -> None:
    """Put back, bit for bit, what a step of these lists overwrote, copies excepted.

    A copy at the speed of memory. Raises: ValueError when `saved` is not what the step was given.
    """
    tensors = [*lists.params, *(t for part in lists.states for t in part)]
    kinds = [[(t.numel(), t.dtype, t.device) for t in part] for part in (tensors, lists.saved)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"undo_step_: saved has {len(lists.saved)} tensors that are not those of {len(tensors)} "
            "parameters and states; give the lists of the step"
        )
    if tensors:
        torch._foreach_copy_(tensors, [s.reshape(t.shape) for s, t in zip(lists.saved, tensors, strict=True)])
