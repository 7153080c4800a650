"""What the optimizer steps are tried with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

from ds_kernels.conformance.sample import LONG, Sample, Samples, Values
from ds_kernels.ops.optim.rules import AdagradHyper, AdamHyper, Hyper, LambHyper, LionHyper, SgdHyper

F, B, H = torch.float32, torch.bfloat16, torch.float16
Kinds = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]
# Nothing, less and more than a vector (4, 8, 16), past a block of staged loops (512), of Triton's (1024).
SIZES = (0, 1, 17, 1025)
# (parameter, gradient, states, copy): every loop that is compiled, then mixtures that go through blocks.
DIRECT: tuple[Kinds, ...] = tuple((F, grad, F, copy) for grad in (F, B, H) for copy in (None, B, H))
STAGED: tuple[Kinds, ...] = (
    (F, F, F, F), (B, B, B, None), (H, H, H, F), (B, F, F, H), (F, B, B, B), (F, H, H, B), (H, B, F, None),
)  # fmt: skip
HYPERS: Mapping[str, tuple[Hyper, ...]] = {
    "adam_step_": (
        AdamHyper(lr=1e-2, weight_decay=0.1),
        AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True),
    ),
    "adagrad_step_": (AdagradHyper(lr=1e-2, weight_decay=0.1, lr_decay=0.01), AdagradHyper(lr=0.1)),
    "lion_step_": (LionHyper(lr=1e-3, weight_decay=0.1, maximize=True), LionHyper(lr=1e-3)),
    "sgd_step_": (
        SgdHyper(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
        SgdHyper(lr=0.1, weight_decay=0.1),
        SgdHyper(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    ),
    "lamb_step_": (LambHyper(lr=1e-2, weight_decay=0.1), LambHyper(lr=1e-2, max_coeff=1.5, maximize=True)),
}
# No alias between a gradient and what is written is refused: an element is read before it is written.
FREE = frozenset({"grad_coef.shape", "grad_coef.dtype", "grad_coef.device", "grads.alias"})


def make(hyper: Hyper, kinds: Kinds, sizes: Sequence[int], device: torch.device, *, saving: bool) -> Sample:
    """One call; the second moments, and Adagrad's sums, are positive."""
    param, grad, state, copy = kinds
    values = Values(sum(sizes), device)

    def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
        return [values.normal(n, dtype=dtype) for n in sizes]

    params, grads, states = drawn(param), drawn(grad), [drawn(state) for _ in hyper.used()]
    for name, part in zip(hyper.used(), states, strict=True):
        if name in ("exp_avg_sqs", "sums"):
            part[:] = [t.square() for t in part]
    given = [*states, *([] for _ in range(len(hyper.states) - len(states)))]
    saved = [torch.empty_like(t) for part in [params, *states] for t in part] if saving else []
    steps = list(range(1, len(sizes) + 1))
    return Sample(
        f"{type(hyper).__name__} {' '.join(str(kind).removeprefix('torch.') for kind in kinds)}",
        (params, grads, *given, drawn(copy) if copy else [], saved, steps),
        {
            **asdict(hyper),
            "grad_coef": torch.tensor(0.37) if hyper.maximize else None,
            "seed": 7 if kinds in STAGED[1::3] else None,
        },
        free=FREE,
    )


def _steps(op: str, device: torch.device) -> Iterator[Sample]:
    first, *others = HYPERS[op]
    # All dtypes with one rule, some with the others, which share its loop; tests/test_steps.py has the rest.
    every = (*DIRECT, *STAGED) if op == "adam_step_" else (*DIRECT[::4], *STAGED[1::3], STAGED[-1])
    for number, kinds in enumerate(every):
        sizes = (*SIZES, LONG) if kinds == (F, F, F, None) else SIZES
        hyper = [first, *others][number % (1 + len(others))]
        yield make(hyper, kinds, sizes, device, saving=number % 4 == 3)
    for hyper in others:
        yield make(hyper, (F, F, F, None), SIZES, device, saving=False)


SAMPLES: Mapping[str, Samples] = {op: partial(_steps, op) for op in HYPERS}
