"""LAMB over a list of tensors: Adam's direction, and a step as long as the weights' norm asks for."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_kernels.native import Native, address, pointers, written
from ds_kernels.ops.optim.elementwise import (
    KINDS,
    SEEDS,
    STATES,
    Call,
    make_fake,
    publish,
    save,
    scaled_grads,
    schema,
    wide,
)
from ds_kernels.ops.optim.lists import narrow_
from ds_kernels.ops.optim.rules import LambHyper, exact_sqrt
from ds_kernels.registry import Kernel, define


def reference(*args: Any, **settings: Any) -> None:
    """The op in plain torch, tensor by tensor."""
    call = Call.of(LambHyper, args, settings)
    if not call.lists.params or call.lists.params[0].device.type == "meta":
        return
    call.lists.check_apart()
    save(call.lists)
    for i in range(len(call.lists.params)):
        reference_one(call, i)


def reference_one(call: Call, place: int) -> None:
    """The step of one tensor of a checked call."""
    hyper, lists = call.hyper, call.lists.chosen([place])
    assert isinstance(hyper, LambHyper)
    first_scale, second_scale = hyper.scales(lists.steps[0])
    (grad,) = scaled_grads(lists, call.grad_coef, hyper.maximize)
    weights, states = wide(lists.params), [wide(part) for part in lists.states]
    (weight,), (first,), (second,) = weights, *states
    first += (grad - first) * (1.0 - hyper.beta1)
    second.mul_(hyper.beta2).add_((grad * grad) * (1.0 - hyper.beta2))
    drawn = call.all_seeds()
    for part, values, seed in zip(lists.states, states, drawn[1:], strict=True):
        narrow_(part, values, None if call.seed is None else seed)
    (first,), (second,) = (wide(part) for part in lists.states)  # as they are kept
    denom = exact_sqrt([second])[0] * second_scale + hyper.eps
    change = (first * first_scale) / denom + weight * hyper.weight_decay
    step = step_length(weight.double().square().sum(), change.double().square().sum(), hyper)
    updated = [weight - change * step]
    publish(replace(lists, names=(), states=[]), updated, [], call.seed)


def step_length(weights: Tensor, changes: Tensor, hyper: LambHyper) -> Tensor:
    """lr times the trust ratio, of two squared norms in double; the ratio is 1 where one of them is 0."""
    ratio = (weights.sqrt() / changes.sqrt()).clamp(hyper.min_coeff, hyper.max_coeff)
    known = (weights > 0) & (changes > 0)
    return (torch.where(known, ratio, torch.ones_like(ratio)) * hyper.lr).float()


class _Call(ctypes.Structure):
    """DsLambCall of sources/optim/lamb_cpu.cpp, field by field."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("states", STATES),
        *((name, ctypes.c_void_p) for name in ("copies", "numels", "scales")),
        *((name, ctypes.c_double) for name in ("lr", "min_coeff", "max_coeff")),
        *((name, ctypes.c_float) for name in ("grad_coef", "lerp", "beta2", "square", "eps", "decay")),
        ("seeds", SEEDS),
        ("kinds", KINDS),
        *((name, ctypes.c_int32) for name in ("stochastic", "isa", "threads")),
    )


def make_native(library: Native) -> Callable[..., None]:
    """The op over the family's library, for CPU tensors: two passes, split into chunks over threads."""
    run = library.function("ds_lamb_step", ctypes.POINTER(_Call))

    def native(*args: Any, **settings: Any) -> None:
        call = Call.of(LambHyper, args, settings)
        flat, rest = call.lists.walkable()
        call.lists.check_apart()
        save(call.lists)
        for i in range(len(rest.params)):
            reference_one(Call(rest, call.hyper, call.grad_coef, call.seed), i)
        if flat.params:
            _run_native(run, Call(flat, call.hyper, call.grad_coef, call.seed), library.isa_code)

    return native


def _run_native(run: Callable[..., None], call: Call, isa: int) -> None:
    lists, hyper = call.lists, call.hyper
    assert isinstance(hyper, LambHyper)
    params, grads, states = pointers(lists.params), pointers(lists.grads), [*map(pointers, lists.states)]
    copies = pointers(lists.copies) if lists.copies else None
    numels, scales = array("q", [t.numel() for t in lists.params]), call.scales()
    coef = 1.0 if call.grad_coef is None else float(call.grad_coef)
    run(
        _Call(
            len(lists.steps), address(params), address(grads), STATES(*map(address, states)), address(copies),
            address(numels), address(scales), hyper.lr, hyper.min_coeff, hyper.max_coeff,
            -coef if hyper.maximize else coef, *hyper.constants(),
            SEEDS(*call.all_seeds()), KINDS(*call.kinds()), call.seed is not None, isa,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    written([t for part in lists.written() for t in part])


def bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[Any]:
    """Moments: the same bits. Weights: the two norms are sums of exact products in double, in another order.

    Their sums are 2^-52 apart for each of n terms at most, so the step length, rounded to fp32, is one
    rounding (2^-23 of it) apart at most: of the whole change |p - before| that is 2^-23. The difference and
    its rounding to the dtype (or to the copy's) may then fall to the next neighbour: one unit in the last
    place, eps * |p|, where a subnormal fp16 has its least unit 2^-24.
    """
    params, copies = args[0], args[4]
    count, limits = len(params), []
    for before, after in zip(params, wanted, strict=False):
        change = (after.double() - before.double()).abs() + _unit(before)
        limits.append(2.0**-23 * change)
    published = wanted[3 * count : 3 * count + len(copies)]
    found = [_unit(value) + limit for value, limit in zip(wanted, limits, strict=False)]
    more = [_unit(value) + limit for value, limit in zip(published, limits, strict=bool(copies))]
    exact = [0.0] * len(wanted)
    return [*found, *exact[: 2 * count], *more, *exact[3 * count + len(copies) :]]


def _unit(value: Tensor) -> Tensor:
    least = 2.0**-24 if value.dtype == torch.float16 else 0.0
    return torch.finfo(value.dtype).eps * value.double().abs() + least


OP = define(
    Kernel(
        name=LambHyper.op,
        schema=schema(LambHyper),
        family="optim",
        reference=reference,
        fake=make_fake(LambHyper),
        native=make_native,
        triton=lambda module: module.lamb_step,
        bound=bound,
    )
)
