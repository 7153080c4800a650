"""Adam, Adagrad, Lion and SGD over lists of tensors: one op for each rule, one reference, one native call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        copy = lists.copies[0].dtype if lists.copies else None
        states = [part[0].dtype for part in lists.states]
        return kinds_of(lists.params[0].dtype, lists.grads[0].dtype, states, copy)

    def constants(self) -> list[float]:
        """The rule's numbers, as many as the loop has room for."""
        return constants_of(self.hyper)

    def scales(self) -> array[float]:
        """Two numbers for each tensor."""
        return scales_of(self.hyper, self.lists.steps)

    def all_seeds(self) -> list[int]:
        """One for the parameters and one for every state list that there could be."""
        return seeds_of(self.hyper, self.seed, len(self.lists.states))


def kinds_of(
    param: torch.dtype, grad: torch.dtype, states: Sequence[torch.dtype], copy: torch.dtype | None
) -> list[int]:
    """The dtypes as `Kinds` of optim.h has them."""
    kept = [code(state) for state in states] + [0] * (MAX_STATES - len(states))
    return [code(param), code(grad), *kept, code(copy)]


def constants_of(hyper: Hyper) -> list[float]:
    """The rule's numbers, as many as the loop has room for."""
    found = hyper.constants()
    return [*found, *(0.0 for _ in range(CONSTANTS - len(found)))]


def scales_of(hyper: Hyper, steps: Sequence[int]) -> array[float]:
    """Two numbers for each tensor, of its step."""
    found = {step: hyper.scales(step) for step in set(steps)}
    if len(found) == 1:
        return array("f", *found.values()) * len(steps)
    return array("f", [number for step in steps for number in found[step]])


def seeds_of(hyper: Hyper, seed: int | None, states: int) -> list[int]:
    """One for the parameters and one for every state list that there could be. Raises ValueError."""
    found = seeds(hyper.op, seed, states)
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


class Part(NamedTuple):
    """One list of tensors as the library gets it."""

    addresses: array[int]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Part:
        return cls(pointers(tensors), tensors[0].dtype)


class Parts(NamedTuple):
    """The lists of a step that one index walks; of copies and `saved` there may be none."""

    numels: array[int]
    params: Part
    grads: Part
    states: list[Part]
    copies: Part | None = None
    saved: Sequence[array[int]] = ()

    def kinds(self) -> list[int]:
        """The dtypes as `Kinds` of optim.h has them."""
        copy = None if self.copies is None else self.copies.dtype
        return kinds_of(self.params.dtype, self.grads.dtype, [part.dtype for part in self.states], copy)


@dataclass(frozen=True)
class Stepper:
    """ds_optim_step of a family's library, under one instruction set."""

    function: Callable[..., None]
    isa: int

    @classmethod
    def of(cls, library: Native) -> Stepper:
        return cls(library.function("ds_optim_step", ctypes.POINTER(_Call)), library.isa_code)

    def run(
        self, parts: Parts, hyper: Hyper, steps: Sequence[int], grad_coef: Tensor | None, seed: int | None
    ) -> None:
        """One call for all, without the interpreter's lock; what is passed has been checked.

        It is split into cache-sized chunks over torch.get_num_threads() threads.
        """
        numels, params, grads, states, copies, saved = parts
        scales, drawn = scales_of(hyper, steps), seeds_of(hyper, seed, len(states))
        coef = 1.0 if grad_coef is None else float(grad_coef)
        self.function(
            _Call(
                len(steps), address(params.addresses), address(grads.addresses),
                STATES(*(address(part.addresses) for part in states)),
                None if copies is None else address(copies.addresses),
                (ctypes.c_void_p * (1 + MAX_STATES))(*map(address, saved)),
                address(numels), address(scales), -coef if hyper.maximize else coef,
                (ctypes.c_float * CONSTANTS)(*constants_of(hyper)), SEEDS(*drawn), KINDS(*parts.kinds()),
                hyper.code, hyper.flags, seed is not None, self.isa, torch.get_num_threads(),
            )
        )  # fmt: skip


def make_native(rule: type[Hyper]) -> Callable[[Native], Callable[..., None]]:
    """The op over the family's library, for CPU tensors."""

    def make(library: Native) -> Callable[..., None]:
        stepper = Stepper.of(library)

        def native(*args: Any, **settings: Any) -> None:
            call = Call.of(rule, args, settings)
            flat, rest = call.lists.walkable()
            if rest.params:
                call.lists.check_apart()
                run_reference(Call(rest, call.hyper, call.grad_coef, call.seed))
            if flat.params:
                _run_native(stepper, Call(flat, call.hyper, call.grad_coef, call.seed))

        return native

    return make


def _run_native(stepper: Stepper, call: Call) -> None:
    lists = call.lists
    parts = Parts(
        array("q", [t.numel() for t in lists.params]),
        Part.of(lists.params),
        Part.of(lists.grads),
        [Part.of(part) for part in lists.states],
        Part.of(lists.copies) if lists.copies else None,
        [pointers(part) for part in lists.saved],
    )
    copies = [parts.copies.addresses] if parts.copies else []
    states = [part.addresses for part in parts.states]
    lists.check_apart([parts.params.addresses, *states, *copies, *parts.saved])
    stepper.run(parts, call.hyper, lists.steps, call.grad_coef, call.seed)
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
