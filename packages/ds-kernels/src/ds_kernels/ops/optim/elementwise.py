"""Adam, Adagrad, Lion and SGD over lists of tensors: one op for each rule, one reference, one native call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_kernels.native import Native, address, code, pointers, written
from ds_kernels.ops.optim.lists import Lists, narrow_, seeds
from ds_kernels.ops.optim.rules import AdagradHyper, AdamHyper, Elementwise, Hyper, LionHyper, SgdHyper
from ds_kernels.registry import Kernel, define

RULES: tuple[type[Elementwise], ...] = (AdamHyper, AdagradHyper, LionHyper, SgdHyper)
# Lengths of arrays in kernels/optim/optim.h.
MAX_STATES, CONSTANTS = 2, 6


@dataclass(frozen=True)
class Call:
    """One call of an op, its arguments sorted and checked."""

    lists: Lists
    hyper: Hyper
    grad_coef: Tensor | None
    seed: int | None

    @classmethod
    def of(cls, rule: type[Hyper], args: Sequence[Any], settings: dict[str, Any]) -> Call:
        """Raises ValueError naming the argument, its index, what it is and what it should be."""
        settings = dict(settings)
        grad_coef, seed = settings.pop("grad_coef", None), settings.pop("seed", None)
        hyper = rule(**settings)
        params, grads, *states, copies, saved, steps = args
        used = hyper.used()
        for name, part in zip(rule.states, states, strict=True):
            if part and name not in used:
                raise ValueError(f"{rule.op}: {name} has {len(part)} entries; without momentum it has none")
        count = len(params)
        if saved and len(saved) != count * (1 + len(used)):
            raise ValueError(
                f"{rule.op}: saved has {len(saved)} entries; wanted: none, or {count} for each of "
                f"{', '.join(('params', *used))}"
            )
        kept = [list(saved[i : i + count]) for i in range(0, len(saved), count or 1)]
        lists = Lists(rule.op, used, params, grads, states[: len(used)], copies, list(steps), kept)
        lists.check()
        seeds(rule.op, seed, len(used))
        return cls(lists, hyper, grad_coef, seed)

    def kinds(self) -> list[int]:
        """The dtypes as `Kinds` of optim.h has them."""
        lists = self.lists
        states = [code(part[0].dtype) for part in lists.states]
        states += [0] * (MAX_STATES - len(states))
        copy = lists.copies[0].dtype if lists.copies else None
        return [code(lists.params[0].dtype), code(lists.grads[0].dtype), *states, code(copy)]

    def constants(self) -> list[float]:
        """The rule's numbers, as many as the loop has room for."""
        found = self.hyper.constants()
        return [*found, *(0.0 for _ in range(CONSTANTS - len(found)))]

    def scales(self) -> array[float]:
        """Two numbers for each tensor."""
        found = {step: self.hyper.scales(step) for step in set(self.lists.steps)}
        return array("f", [number for step in self.lists.steps for number in found[step]])

    def all_seeds(self) -> list[int]:
        """One for the parameters and one for every state list that there could be."""
        found = seeds(self.hyper.op, self.seed, len(self.lists.states))
        return [*found, *(0 for _ in range(1 + MAX_STATES - len(found)))]


# -- the reference -----------------------------------------------------------------------------------------


def make_reference(rule: type[Hyper]) -> Callable[..., None]:
    """The rule's op in plain torch: every product and sum an operator of its own, so that rounding is plain.

    On the CPU it runs tensor by tensor, which bounds the memory of temporaries by the largest tensor;
    elsewhere in one multi-tensor call.
    """

    def reference(*args: Any, **settings: Any) -> None:
        call = Call.of(rule, args, settings)
        if call.lists.params and call.lists.params[0].device.type != "meta":
            call.lists.check_apart()
            run_reference(call)

    return reference


def run_reference(call: Call) -> None:
    """The step, of a checked call."""
    count = len(call.lists.params)
    width = 1 if count and call.lists.params[0].device.type == "cpu" else count
    for i in range(0, count, width or 1):
        lists = call.lists.chosen(range(i, i + width))
        save(lists)
        grads = scaled_grads(lists, call.grad_coef, call.hyper.maximize)
        weights, states = wide(lists.params), [wide(part) for part in lists.states]
        assert isinstance(call.hyper, Elementwise)
        call.hyper.update(weights, grads, states, lists.steps)
        publish(lists, weights, states, call.seed)


def save(lists: Lists) -> None:
    """Keep what the step will overwrite, where that is wanted."""
    for kept, values in zip(lists.saved, [lists.params, *lists.states], strict=bool(lists.saved)):
        torch._foreach_copy_(kept, [v.reshape(k.shape) for k, v in zip(kept, values, strict=True)])


def scaled_grads(lists: Lists, grad_coef: Tensor | None, maximize: bool) -> list[Tensor]:
    """The gradients in fp32, in memory of their own."""
    pairs = zip(lists.grads, lists.params, strict=True)
    grads = [g.to(torch.float32, copy=True).reshape(p.shape) for g, p in pairs]
    if grad_coef is not None:
        torch._foreach_mul_(grads, grad_coef.to(grads[0].device, torch.float32))
    if maximize:
        torch._foreach_neg_(grads)
    return grads


def wide(values: list[Tensor]) -> list[Tensor]:
    """The list itself when it is fp32, else a copy that is."""
    return values if values[0].dtype == torch.float32 else [v.to(torch.float32) for v in values]


def publish(lists: Lists, weights: list[Tensor], states: list[list[Tensor]], seed: int | None) -> None:
    """Round what was computed in fp32 into the copies, the parameters and the states."""
    if lists.copies:
        shaped = [w.reshape(c.shape) for w, c in zip(weights, lists.copies, strict=True)]
        torch._foreach_copy_(lists.copies, shaped)
    drawn = seeds(lists.op, seed, len(states))
    for part, values, one in zip([lists.params, *lists.states], [weights, *states], drawn, strict=True):
        narrow_(part, values, None if seed is None else one)


def make_fake(rule: type[Hyper]) -> Callable[..., None]:
    """The op while torch traces: checks, and nothing to return."""

    def fake(*args: Any, **settings: Any) -> None:
        Call.of(rule, args, settings)

    return fake


# -- native ------------------------------------------------------------------------------------------------

KINDS = ctypes.c_int32 * (3 + MAX_STATES)
STATES = ctypes.c_void_p * MAX_STATES
SEEDS = ctypes.c_uint32 * (1 + MAX_STATES)


class _Call(ctypes.Structure):
    """DsOptimCall of sources/optim/optim_cpu.cpp, field by field."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("states", STATES),
        ("copies", ctypes.c_void_p),
        ("saved", ctypes.c_void_p * (1 + MAX_STATES)),
        ("numels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("grad_coef", ctypes.c_float),
        ("constants", ctypes.c_float * CONSTANTS),
        ("seeds", SEEDS),
        ("kinds", KINDS),
        *((name, ctypes.c_int32) for name in ("rule", "flags", "stochastic", "isa", "threads")),
    )


def make_native(rule: type[Hyper]) -> Callable[[Native], Callable[..., None]]:
    """The op over the family's library, for CPU tensors.

    The lists are one call, split into cache-sized chunks over torch.get_num_threads() threads, without the
    interpreter's lock.
    """

    def make(library: Native) -> Callable[..., None]:
        run = library.function("ds_optim_step", ctypes.POINTER(_Call))

        def native(*args: Any, **settings: Any) -> None:
            call = Call.of(rule, args, settings)
            flat, rest = call.lists.walkable()
            if rest.params:
                call.lists.check_apart()
                run_reference(Call(rest, call.hyper, call.grad_coef, call.seed))
            if flat.params:
                _run_native(run, Call(flat, call.hyper, call.grad_coef, call.seed), library.isa_code)

        return native

    return make


def _run_native(run: Callable[..., None], call: Call, isa: int) -> None:
    lists, hyper = call.lists, call.hyper
    params, grads = pointers(lists.params), pointers(lists.grads)
    states, saved = [pointers(part) for part in lists.states], [pointers(part) for part in lists.saved]
    copies = pointers(lists.copies) if lists.copies else None
    lists.check_apart([params, *states, *([copies] if copies else []), *saved])
    numels, scales = array("q", [t.numel() for t in lists.params]), call.scales()
    coef = 1.0 if call.grad_coef is None else float(call.grad_coef)
    run(
        _Call(
            len(lists.steps), address(params), address(grads), STATES(*map(address, states)), address(copies),
            (ctypes.c_void_p * (1 + MAX_STATES))(*map(address, saved)), address(numels), address(scales),
            -coef if hyper.maximize else coef, (ctypes.c_float * CONSTANTS)(*call.constants()),
            SEEDS(*call.all_seeds()), KINDS(*call.kinds()),
            hyper.code, hyper.flags, call.seed is not None, isa, torch.get_num_threads(),
        )
    )  # fmt: skip
    written([t for part in lists.written() for t in part])


# -- the ops -----------------------------------------------------------------------------------------------


def schema(rule: type[Hyper]) -> str:
    """The op's arguments: every list but the gradients is written."""
    lists = ["params", "grads", *rule.states, "copies", "saved"]
    marks = iter("abcdefg")
    declared = [f"Tensor[] {n}" if n == "grads" else f"Tensor({next(marks)}!)[] {n}" for n in lists]
    more = f"int[] steps, *, {rule.schema()}, Tensor? grad_coef=None, int? seed=None"
    return f"({', '.join(declared)}, {more}) -> ()"


def _define(rule: type[Hyper]) -> Callable[..., None]:
    return define(
        Kernel(
            name=rule.op,
            schema=schema(rule),
            family="optim",
            reference=make_reference(rule),
            fake=make_fake(rule),
            native=make_native(rule),
            triton=lambda module: module.make_step(rule),
        )
    )


OPS = {rule.op: _define(rule) for rule in RULES}
