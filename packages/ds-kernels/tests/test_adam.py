"""Every implementation of the Adam op against the reference, bit by bit, and against torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_kernels import AdamHyper, adam_step_, load
from ds_kernels.library import open_library
from ds_kernels.native import DTYPES, ISAS, Native, Options
from ds_kernels.ops.adam import OP, make_native, reference, torch_fused

F, B = torch.float32, torch.bfloat16
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies")
# Around every vector width (1, 4, 8, 16), more than one chunk (32768), and nothing at all.
SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 1000, 32769)
ADAMW = AdamHyper(lr=1e-2, weight_decay=0.1)
L2 = AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True)


@pytest.fixture(scope="module")
def natives() -> dict[str, Callable[..., None]]:
    """The native op under every instruction set that this processor has."""
    handle = open_library("adam").handle
    here = Native(handle).isas()
    print(f"instruction sets here: {here}; not tested: {sorted({*ISAS[1:]} - {*here})}")
    return {isa: make_native(Native(handle, Options(isa))) for isa in here}


def data(
    sizes: tuple[int, ...], param: torch.dtype, grad: torch.dtype, copy: torch.dtype | None, offset: int = 0
) -> list[list[Tensor]]:
    """The op's five lists, at odd addresses when `offset` is odd."""
    generator = torch.Generator().manual_seed(sum(sizes))

    def cut(n: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(n + offset, generator=generator).to(dtype)[offset:]

    lists = [[cut(n, dtype) for n in sizes] for dtype in (param, grad, torch.float32, torch.float32)]
    lists[3] = [v.square() for v in lists[3]]
    return [*lists, [cut(n, copy) for n in sizes] if copy else []]


def same(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for name, left, right in zip(LISTS, mine, theirs, strict=True):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert torch.equal(a, b), f"{name}[{i}] differs by {(a.double() - b.double()).abs().max()}"


def apply(
    function: Callable[..., None], lists: list[list[Tensor]], hyper: AdamHyper, **extra: Any
) -> list[list[Tensor]]:
    function(*lists, list(range(1, len(lists[0]) + 1)), **asdict(hyper), **extra)
    return lists


@pytest.mark.parametrize("param", DTYPES)
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("copy", [None, *DTYPES])
def test_native_equals_reference(
    natives: dict[str, Callable[..., None]], param: torch.dtype, grad: torch.dtype, copy: torch.dtype | None
) -> None:
    coef = torch.tensor(0.37)
    for hyper, offset in product((ADAMW, L2), (0, 1)):
        wanted = apply(reference, data(SIZES, param, grad, copy, offset), hyper, grad_coef=coef)
        for native in natives.values():
            same(apply(native, data(SIZES, param, grad, copy, offset), hyper, grad_coef=coef), wanted)


def test_streaming_stores_write_the_same(natives: dict[str, Callable[..., None]]) -> None:
    """Above four million elements the copy bypasses the caches; unaligned copies and tails must not."""
    sizes = (4_200_001, 17, 32768)
    for offset in (0, 1):
        wanted = apply(reference, data(sizes, torch.float32, torch.bfloat16, torch.bfloat16, offset), ADAMW)
        for native in natives.values():
            same(
                apply(native, data(sizes, torch.float32, torch.bfloat16, torch.bfloat16, offset), ADAMW),
                wanted,
            )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_cuts_do_not_change_a_bit(natives: dict[str, Callable[..., None]], threads: int) -> None:
    """One tensor of n elements, or the same memory as many tensors: the same bits. Sharding relies on it."""
    before = torch.get_num_threads()
    whole, cut = (data((200_003,), torch.float32, torch.bfloat16, torch.bfloat16) for _ in range(2))
    pieces = [list(part[0].split(1013)) for part in cut]
    torch.set_num_threads(threads)
    try:
        for native in natives.values():
            native(*whole, [7], **asdict(ADAMW))
            native(*pieces, [7] * len(pieces[0]), **asdict(ADAMW))
            same(whole, cut)
    finally:
        torch.set_num_threads(before)


def test_special_values(natives: dict[str, Callable[..., None]]) -> None:
    """Infinities, NaN, zeros, subnormals and the largest values go the same way everywhere."""
    edge = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        6e-8,
        5.9e-8,
        2.98e-8,
        6.1e-5,
        65504.0,
        65519.9,
        65520.0,
        3.39e38,
        1e-20,
    ]
    values = torch.tensor([*edge, float("inf"), -float("inf"), float("nan"), 1.0])
    for param, grad, copy in product(DTYPES, DTYPES, (torch.bfloat16, torch.float16)):

        def lists(
            param: torch.dtype = param, grad: torch.dtype = grad, copy: torch.dtype = copy
        ) -> list[list[Tensor]]:
            p, g = values.repeat_interleave(values.numel()), values.repeat(values.numel())
            return [
                [p.to(param)],
                [g.to(grad)],
                [torch.zeros_like(p)],
                [torch.zeros_like(p)],
                [torch.empty_like(p, dtype=copy)],
            ]

        wanted = apply(reference, lists(), ADAMW)
        for isa, native in natives.items():
            for name, mine, theirs in zip(LISTS, apply(native, lists(), ADAMW), wanted, strict=True):
                equal = torch.allclose(mine[0], theirs[0], rtol=0, atol=0, equal_nan=True)
                assert equal, (isa, name, param, grad, copy)


def test_every_half_converts_exactly(natives: dict[str, Callable[..., None]]) -> None:
    """All 65536 patterns of both formats, in and out: with lr 0 a step is a conversion and nothing else."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    still = AdamHyper(lr=0.0)
    for dtype in DTYPES[1:]:
        for native in natives.values():
            p = every.view(dtype).clone()
            copy = torch.empty(p.numel())
            native(
                [p],
                [torch.zeros(p.numel())],
                [torch.zeros(p.numel())],
                [torch.ones(p.numel())],
                [copy],
                [1],
                **asdict(still),
            )
            assert torch.allclose(copy, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
            assert torch.allclose(p, every.view(dtype), rtol=0, atol=0, equal_nan=True)


def test_rounding_is_to_nearest_even(natives: dict[str, Callable[..., None]]) -> None:
    """Values halfway between two neighbours, just below and just above, against torch's own conversion."""
    for dtype in DTYPES[1:]:
        below = torch.arange(0, 2**15 - 2**11, 3, dtype=torch.int32).to(torch.int16).view(dtype).double()
        above = torch.arange(1, 2**15 - 2**11 + 1, 3, dtype=torch.int32).to(torch.int16).view(dtype).double()
        middle = ((below + above) / 2).float()
        middle = middle[middle.isfinite() & (middle.abs() > 1e-37)]
        values = torch.cat(
            [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e38)), -middle]
        )
        for native in natives.values():
            copy = torch.empty(values.numel(), dtype=dtype)
            zeros = [torch.zeros(values.numel()) for _ in range(3)]
            native(
                [values.clone()],
                [zeros[0]],
                [zeros[1]],
                [zeros[2] + 1],
                [copy],
                [1],
                **asdict(AdamHyper(lr=0.0)),
            )
            assert torch.equal(copy, values.to(dtype))


def layouts() -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Lists that are not plainly contiguous: one shared dense layout, mixed ones, and gaps."""

    def make(
        shape: tuple[int, ...], change: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor]
    ) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(3)
        p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
        return [
            [change(p)],
            [grad(g)],
            [change(m)],
            [change(v.square())],
            [torch.zeros(p.numel(), dtype=torch.bfloat16).view(shape)],
        ]

    last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
    yield "channels_last", [*make((2, 5, 3, 3), last, last)[:4], []]
    yield "channels_last with a contiguous gradient", make((2, 5, 3, 3), last, lambda t: t)
    yield "transposed", make((5, 7), lambda t: t.t().contiguous().t(), lambda t: t)
    yield "every second", make((9, 8), lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t)
    yield "expanded gradient", make((6, 4), lambda t: t, lambda t: t[:, :1].expand(6, 4))


@pytest.mark.parametrize("which", range(5))
def test_layouts(natives: dict[str, Callable[..., None]], which: int) -> None:
    name, wanted = list(layouts())[which]
    apply(reference, wanted, ADAMW)
    for native in natives.values():
        lists = list(layouts())[which][1]
        plain = data((5, 40), torch.float32, torch.float32, torch.bfloat16 if lists[4] else None)
        mixed = [[*a, *b] for a, b in zip(plain, lists, strict=True)]
        native(*mixed, [1, 1, 1], **asdict(ADAMW))
        same([part[2:] for part in mixed], wanted)
        assert name


def test_mutates_only_what_the_schema_says(natives: dict[str, Callable[..., None]]) -> None:
    for function in (reference, *natives.values()):
        lists = data((33,), torch.bfloat16, torch.bfloat16, torch.float16)
        grad, coef = lists[1][0].clone(), torch.tensor(0.5)
        function(*lists, [1], **asdict(L2), grad_coef=coef)
        assert torch.equal(lists[1][0], grad)
        assert coef.item() == 0.5


def test_autograd_notices_the_write(natives: dict[str, Callable[..., None]]) -> None:
    """A graph that saved a parameter before the step must not be run backward after it."""
    load("adam", torch.device("cpu"))
    p = torch.ones(4, requires_grad=True)
    loss = (p * p).sum()
    adam_step_([p], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], [1], ADAMW)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_hundred_steps_against_torch(decoupled: bool, maximize: bool) -> None:
    """fp32, 100 steps: relative distance at most 1e-6, about eight fp32 roundings of 6e-8."""
    load("adam", torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(4099, generator=generator)
    theirs = mine.clone().requires_grad_()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([theirs], lr=1e-2, weight_decay=0.1, maximize=maximize, foreach=False)
    hyper = AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=decoupled, maximize=maximize)
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    for step in range(1, 101):
        grad = torch.randn(mine.shape, generator=generator) * 0.1
        theirs.grad = grad.clone()
        optimizer.step()
        adam_step_([mine], [grad], [m], [v], [step], hyper)
    state = optimizer.state[theirs]
    for a, b in ((mine, theirs.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_parameters_stay_within_their_rounding(dtype: torch.dtype) -> None:
    """Each step rounds once, by at most u * |p| (u: half an ulp of 1); the update itself is computed in fp32.

    The update depends on p only through weight decay (factor 1 - lr * wd <= 1), so after T steps the distance
    to the fp32 run on the same gradients is at most T roundings: T * u * max|p| (+ fp16's least subnormal).
    """
    load("adam", torch.device("cpu"))
    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(2049, generator=generator).to(dtype)
    full = low.float()
    moments = [[torch.zeros(2049)] for _ in range(4)]
    biggest = full.abs()
    for step in range(1, 51):
        grad = torch.randn(2049, generator=generator).to(dtype)
        adam_step_([low], [grad], moments[0], moments[1], [step], ADAMW)
        adam_step_([full], [grad], moments[2], moments[3], [step], ADAMW)
        biggest = torch.maximum(biggest, torch.maximum(full.abs(), low.float().abs()))
    same([moments[0], moments[1]] + [[]] * 3, [moments[2], moments[3]] + [[]] * 3)
    assert ((low.float() - full).abs() <= 50 * (unit * 1.01 * biggest + 2.0**-25)).all()
    assert not torch.equal(low.float(), full)


@pytest.mark.parametrize("hyper", [ADAMW, L2])
def test_torch_fused_agrees(hyper: AdamHyper) -> None:
    """What GPUs get, run on CPU tensors: torch fuses products and sums, so a few roundings of 6e-8 apart."""
    for param, grad, copy in ((F, F, None), (F, B, B), (F, torch.float16, F), (B, B, F)):
        coef = torch.tensor(0.37)
        wanted, mine = data((33, 1000, 0), param, grad, copy), data((33, 1000, 0), param, grad, copy)
        apply(reference, wanted, hyper, grad_coef=coef)
        apply(torch_fused, mine, hyper, grad_coef=coef)
        assert all(
            torch.equal(a, b) for a, b in zip(mine[1], data((33, 1000, 0), param, grad, copy)[1], strict=True)
        )
        for part, theirs in zip((*mine[:1], *mine[2:4]), (*wanted[:1], *wanted[2:4]), strict=True):
            for a, b in zip(part, theirs, strict=True):
                assert ((a - b).abs() <= 1e-6 * (b.abs() + 1e-2)).all()
        for a, b in zip(mine[4], wanted[4] if param != F else mine[0], strict=copy is not None):
            assert torch.equal(a, b.to(a.dtype))


def test_opcheck() -> None:
    load("adam", torch.device("cpu"))
    for dtype in DTYPES:
        for copy in (None, torch.bfloat16):
            args = (*data((5, 33), dtype, torch.bfloat16, copy), [1, 2])
            torch.library.opcheck(OP, args, {**asdict(ADAMW), "grad_coef": torch.tensor(0.5)})


def test_compiles_into_one_graph() -> None:
    load("adam", torch.device("cpu"))

    def step(*lists: list[Tensor]) -> None:
        OP(*lists, [3, 3], **asdict(ADAMW))

    wanted = data((5, 33), torch.float32, torch.bfloat16, torch.bfloat16)
    mine = data((5, 33), torch.float32, torch.bfloat16, torch.bfloat16)
    step(*wanted)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    same(mine, wanted)


def bad(**change: Any) -> dict[str, Any]:
    lists = data((4, 6), torch.float32, torch.float32, torch.bfloat16)
    return {**dict(zip(LISTS, lists, strict=True)), "steps": [1, 1], **change}


WRONG = {
    "exp_avgs has 1 entries, params has 2": bad(exp_avgs=[torch.zeros(4)]),
    r"grads\[1\] is shape \(5,\)": bad(grads=[torch.zeros(4), torch.zeros(5)]),
    r"exp_avgs\[0\] is shape \(2, 2\)": bad(exp_avgs=[torch.zeros(2, 2), torch.zeros(6)]),
    r"exp_avg_sqs\[0\] is .*bfloat16": bad(exp_avg_sqs=[torch.zeros(4, dtype=B), torch.zeros(6, dtype=B)]),
    r"grads\[1\] is .*bfloat16": bad(grads=[torch.zeros(4), torch.zeros(6, dtype=B)]),
    r"copies\[0\] is .*int32": bad(copies=[torch.zeros(n, dtype=torch.int32) for n in (4, 6)]),
    r"grads\[1\] is .*sparse": bad(grads=[torch.zeros(4), torch.zeros(6).to_sparse()]),
    r"grads\[0\] is .*meta": bad(grads=[torch.zeros(4, device="meta"), torch.zeros(6)]),
    r"steps\[1\]=0": bad(steps=[1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_a_value_error(natives: dict[str, Callable[..., None]], words: str) -> None:
    for function in (reference, *natives.values()):
        with pytest.raises(ValueError, match=words):
            function(**WRONG[words], **asdict(ADAMW))


def test_aliases_are_refused(natives: dict[str, Callable[..., None]]) -> None:
    for function in (reference, *natives.values()):
        lists = data((4,), F, F, None)
        with pytest.raises(ValueError, match="same address"):
            function(*lists[:3], lists[2], [], [1], **asdict(ADAMW))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("beta1", 1.0), ("beta2", -0.1), ("eps", -1e-8), ("weight_decay", float("nan"))],
)
def test_bad_hyper(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        AdamHyper(**{"lr": 1e-3, name: value})


def test_missing_instruction_set_is_an_error() -> None:
    handle = open_library("adam").handle
    absent = next(isa for i, isa in enumerate(ISAS) if i and not handle.ds_has_isa(i))
    with pytest.raises(ValueError, match="no such instruction set"):
        Native(handle, Options(absent))
    with pytest.raises(ValueError, match="sse9"):
        Options("sse9")
