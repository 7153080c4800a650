"""Adam and AdamW over a list of tensors: schema, reference, checks and the function people call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ds_kernels.check import names, refuse
from ds_kernels.native import DTYPES, Native, address, code, pointers, written
from ds_kernels.registry import Kernel, define

NAME = "adam_step_"
SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] copies, int[] steps, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool decoupled, bool maximize, Tensor? grad_coef=None) -> ()"
)


@dataclass(frozen=True, kw_only=True)
class AdamHyper:
    """What a step needs besides tensors; `decoupled` is AdamW, else weight decay joins the gradient (L2)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed, fits in (
            ("lr", self.lr, ">= 0", self.lr >= 0),
            ("beta1", self.beta1, "in [0, 1)", 0 <= self.beta1 < 1),
            ("beta2", self.beta2, "in [0, 1)", 0 <= self.beta2 < 1),
            ("eps", self.eps, ">= 0", self.eps >= 0),
            ("weight_decay", self.weight_decay, ">= 0", self.weight_decay >= 0),
        ):
            if not fits:
                raise ValueError(f"Adam: {name}={value} is not allowed: it must be {allowed}")

    def step_size(self, step: int) -> float:
        """lr / (1 - beta1^t), in double."""
        return self.lr / (1.0 - self.beta1**step)

    def denom_scale(self, step: int) -> float:
        """1 / sqrt(1 - beta2^t), in double."""
        return float((1.0 - self.beta2**step) ** -0.5)


@torch.no_grad()
def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    hyper: AdamHyper,
    *,
    copies: Sequence[Tensor] = (),
    grad_coef: Tensor | None = None,
) -> None:
    """One Adam step of every tensor in the lists, in one pass over memory.

    Kingma and Ba 2015, algorithm 1; `hyper.decoupled`: Loshchilov and Hutter 2019, algorithm 2.
    Gradients are multiplied by `grad_coef` (unscaling and clipping) as they are read. The new values also go
    to `copies`, rounded once from fp32 to their dtype. `steps` counts this step: 1 the first time.
    Shapes: the i-th of every list has the same numel; dtypes fp32, bf16 or fp16, one per list; moments fp32.
    Raises: ValueError naming the argument, its index, what it is and what it should be.
    """
    OP(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(copies), list(steps),
        **asdict(hyper), grad_coef=grad_coef,
    )  # fmt: skip


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[int],
    *,
    grad_coef: Tensor | None = None,
    **settings: Any,
) -> None:
    """The op in plain torch: every product and sum an operator of its own, so that rounding is plain to see.

    On the CPU it runs tensor by tensor, which bounds the memory of temporaries by the largest tensor;
    elsewhere in one multi-tensor call.
    """
    hyper = AdamHyper(**settings)
    check(params, grads, exp_avgs, exp_avg_sqs, copies, steps)
    if not params or params[0].device.type == "meta":
        return
    check_apart([[t.data_ptr() for t in part] for part in (params, exp_avgs, exp_avg_sqs, copies)])
    width = 1 if params[0].device.type == "cpu" else len(params)
    for i in range(0, len(params), width):
        part = slice(i, i + width)
        shaped = [g.reshape(p.shape) for p, g in zip(params[part], grads[part], strict=True)]
        updated = _reference_group(
            params[part], shaped, exp_avgs[part], exp_avg_sqs[part], steps[part], hyper, grad_coef
        )
        _copy_out(updated, copies[part])


def _reference_group(
    params: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[int],
    hyper: AdamHyper,
    grad_coef: Tensor | None,
) -> list[Tensor]:
    """Step one group; return the new values in fp32."""
    grad = [g.to(torch.float32, copy=True) for g in grads]
    if grad_coef is not None:
        torch._foreach_mul_(grad, grad_coef.to(grad[0].device, torch.float32))
    if hyper.maximize:
        torch._foreach_neg_(grad)
    weight = [p.to(torch.float32) for p in params]  # the parameter itself when it is fp32
    if hyper.decoupled:
        torch._foreach_mul_(weight, 1.0 - hyper.lr * hyper.weight_decay)
    elif hyper.weight_decay:
        torch._foreach_add_(grad, torch._foreach_mul(weight, hyper.weight_decay))

    change = torch._foreach_sub(grad, firsts)
    torch._foreach_mul_(change, 1.0 - hyper.beta1)
    torch._foreach_add_(firsts, change)
    torch._foreach_mul_(grad, grad)
    torch._foreach_mul_(grad, 1.0 - hyper.beta2)
    torch._foreach_mul_(seconds, hyper.beta2)
    torch._foreach_add_(seconds, grad)

    denom = [_exact_sqrt(v) for v in seconds]
    torch._foreach_mul_(denom, [hyper.denom_scale(t) for t in steps])
    torch._foreach_add_(denom, hyper.eps)
    update = torch._foreach_div(firsts, denom)
    torch._foreach_mul_(update, [hyper.step_size(t) for t in steps])
    torch._foreach_sub_(weight, update)
    if params[0].dtype != torch.float32:
        torch._foreach_copy_(params, weight)
    return weight


def _exact_sqrt(x: Tensor) -> Tensor:
    """The IEEE square root. torch's own on the CPU is an ulp off in a fifth of all cases (MKL)."""
    return x.double().sqrt_().float() if x.device.type == "cpu" else x.sqrt()


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[int],
) -> None:
    """Raise ValueError for anything that the op does not allow, except aliasing (see `check_apart`)."""
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "copies": copies,
    }
    if not copies:
        del lists["copies"]
    for name, values in (*lists.items(), ("steps", steps)):
        if len(values) != len(params):
            raise ValueError(
                f"{NAME}: {name} has {len(values)} entries, params has {len(params)}: one for each parameter"
            )
    if not params:
        return
    device, shapes, numels = params[0].device, [p.shape for p in params], [p.numel() for p in params]
    for name, tensors in lists.items():
        moment = name.startswith("exp_avg")
        allowed = (torch.float32,) if moment else DTYPES
        kinds = {(t.dtype, t.device, t.layout) for t in tensors}
        first = tensors[0]
        if (
            len(kinds) > 1
            or first.dtype not in allowed
            or first.device != device
            or first.layout != torch.strided
        ):
            wanted = f"strided, on {device}, one dtype of {names(allowed)} for the whole list"
            kind = (first.dtype if first.dtype in allowed else allowed[0], device, torch.strided)
            _refuse(name, tensors, wanted, [(t.dtype, t.device, t.layout) == kind for t in tensors])
        if moment and [t.shape for t in tensors] != shapes:
            _refuse(
                name,
                tensors,
                "its parameter's shape",
                [t.shape == s for t, s in zip(tensors, shapes, strict=True)],
            )
        if not moment and [t.numel() for t in tensors] != numels:
            fits = [t.numel() == n for t, n in zip(tensors, numels, strict=True)]
            _refuse(name, tensors, "as many elements as its parameter", fits)
    if min(steps) < 1:
        at = list(steps).index(min(steps))
        raise ValueError(f"{NAME}: steps[{at}]={steps[at]}: they count from 1, this step included")


def check_apart(written: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if two tensors that the step writes start at one address (0 is an empty tensor's)."""
    addresses = [address for part in written for address in part if address]
    if len(set(addresses)) != len(addresses):
        raise ValueError(
            f"{NAME}: two of params, exp_avgs, exp_avg_sqs and copies start at the same address; "
            "give each its own memory"
        )


def _refuse(name: str, tensors: Sequence[Tensor], wanted: str, fits: Sequence[bool]) -> None:
    at = fits.index(False)
    refuse(NAME, f"{name}[{at}]", tensors[at], wanted)


def fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[int],
    **_: Any,
) -> None:
    """The op while torch traces: checks, and nothing to return."""
    check(params, grads, exp_avgs, exp_avg_sqs, copies, steps)


def torch_fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[int],
    *,
    grad_coef: Tensor | None = None,
    **settings: Any,
) -> None:
    """The op on a GPU through torch's own fused kernel, and what that lacks; no host synchronisation."""
    if not params or params[0].dtype != torch.float32:
        return reference(params, grads, exp_avgs, exp_avg_sqs, copies, steps, grad_coef=grad_coef, **settings)
    hyper = AdamHyper(**settings)
    check(params, grads, exp_avgs, exp_avg_sqs, copies, steps)
    check_apart([[t.data_ptr() for t in part] for part in (params, exp_avgs, exp_avg_sqs, copies)])
    grads = [g.to(torch.float32).reshape(p.shape) for g, p in zip(grads, params, strict=True)]
    if grad_coef is not None:
        grads = list(torch._foreach_mul(grads, grad_coef.to(params[0].device, torch.float32)))
    on_device = {t: torch.full((), float(t), device=params[0].device) for t in set(steps)}
    step = torch._fused_adamw_ if hyper.decoupled else torch._fused_adam_
    step(
        params, grads, exp_avgs, exp_avg_sqs, [], [on_device[t] for t in steps],
        lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, weight_decay=hyper.weight_decay, eps=hyper.eps,
        amsgrad=False, maximize=hyper.maximize,
    )  # fmt: skip
    _copy_out(params, copies)


def _copy_out(values: list[Tensor], copies: list[Tensor]) -> None:
    if copies:
        torch._foreach_copy_(copies, [x.reshape(c.shape) for x, c in zip(values, copies, strict=True)])


class _Call(ctypes.Structure):
    """DsAdamCall of sources/adam/adam_cpu.cpp, field by field."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies")),
        *((name, ctypes.c_void_p) for name in ("numels", "step_sizes", "denom_scales")),
        *((name, ctypes.c_float) for name in ("grad_coef", "lerp", "beta2", "square", "eps", "decay")),
        *(
            (name, ctypes.c_int32)
            for name in ("param_dtype", "grad_dtype", "copy_dtype", "l2", "isa", "threads")
        ),
    )


def make_native(library: Native) -> Callable[..., None]:
    """The op over the family's library, for CPU tensors.

    The lists are one call, split into cache-sized chunks over torch.get_num_threads() threads, without the
    interpreter's lock.
    """
    run = library.function("ds_adam_step", ctypes.POINTER(_Call))

    def native(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        copies: list[Tensor],
        steps: list[int],
        *,
        grad_coef: Tensor | None = None,
        **settings: Any,
    ) -> None:
        hyper = AdamHyper(**settings)
        check(params, grads, exp_avgs, exp_avg_sqs, copies, steps)
        lists = [params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])]
        if not all(t.is_contiguous() for part in lists for t in part):
            flat = [_is_flat(tensors) for tensors in zip(*lists, strict=True)]
            every: list[list[Any]] = [*lists, steps]
            rest = [[t for t, ok in zip(part, flat, strict=True) if not ok] for part in every]
            lists = [[t for t, ok in zip(part, flat, strict=True) if ok] for part in lists]
            steps = [t for t, ok in zip(steps, flat, strict=True) if ok]
            if not copies:
                rest.insert(4, [])
            reference(*rest, grad_coef=grad_coef, **settings)
        if steps:
            coef = 1.0 if grad_coef is None else float(grad_coef)
            _run_native(run, lists, steps, hyper, -coef if hyper.maximize else coef, library.isa_code)

    return native


def _is_flat(tensors: Sequence[Tensor]) -> bool:
    """Can one index walk the memory of all: contiguous, or of one dense layout (channels_last)?"""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    alike = all(t.shape == first.shape and t.stride() == first.stride() for t in tensors)
    return alike and bool(torch.ops.aten.is_non_overlapping_and_dense(first))


def _run_native(
    run: Callable[..., None],
    lists: list[list[Tensor]],
    steps: list[int],
    hyper: AdamHyper,
    coef: float,
    isa: int,
) -> None:
    places = [pointers(part) for part in lists]
    check_apart([part for i, part in enumerate(places) if i != 1])
    numels = array("q", [t.numel() for t in lists[0]])
    scales = {t: (hyper.step_size(t), hyper.denom_scale(t)) for t in set(steps)}
    step_sizes, denom_scales = (array("f", [scales[t][k] for t in steps]) for k in (0, 1))
    copying = len(lists) == 5
    l2 = not hyper.decoupled and hyper.weight_decay != 0
    run(
        _Call(
            len(steps), *map(address, places[:4]), address(places[4]) if copying else None,
            address(numels), address(step_sizes), address(denom_scales),
            coef, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2, hyper.eps,
            hyper.weight_decay if l2 else (1.0 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0),
            code(lists[0][0].dtype), code(lists[1][0].dtype), code(lists[4][0].dtype if copying else None),
            l2, isa, torch.get_num_threads(),
        )
    )  # fmt: skip
    written([t for i, part in enumerate(lists) if i != 1 for t in part])


OP = define(
    Kernel(
        name=NAME,
        schema=SCHEMA,
        family="adam",
        reference=reference,
        fake=fake,
        native=make_native,
        torch={"cuda": torch_fused},
    )
)
