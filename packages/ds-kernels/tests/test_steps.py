"""What conformance cannot see of the optimizer steps: torch.optim, cuts, special values, chance, undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_kernels import (
    AdagradHyper,
    AdamHyper,
    LambHyper,
    LionHyper,
    SgdHyper,
    StepLists,
    load,
    optim_step_,
    undo_step_,
)
from ds_kernels.library import open_library
from ds_kernels.native import DTYPES, ISAS, Native, Options
from ds_kernels.ops.optim.lists import narrow_, seeds
from ds_kernels.ops.optim.rules import Hyper
from ds_kernels.ops.optim.step import OPS
from ds_kernels.registry import registry

F, B = torch.float32, torch.bfloat16
ADAMW = AdamHyper(lr=1e-2, weight_decay=0.1)
HYPERS: list[Hyper] = [
    ADAMW,
    AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True),
    AdagradHyper(lr=1e-2, weight_decay=0.1),
    LionHyper(lr=1e-3, weight_decay=0.1),
    SgdHyper(lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
    SgdHyper(lr=1e-2, weight_decay=0.1),
    LambHyper(lr=1e-2, weight_decay=0.1),
]
ELEMENTWISE = HYPERS[:-1]
Step = Callable[..., None]


def name_of(hyper: Hyper) -> str:
    return f"{type(hyper).__name__}{HYPERS.index(hyper)}"


@pytest.fixture(scope="module", autouse=True)
def loaded(own_cache: None) -> None:
    load("optim", torch.device("cpu"))


@pytest.fixture(scope="module")
def natives() -> dict[str, Native]:
    """The library under every instruction set that this processor has."""
    handle = open_library("optim").handle
    here = Native(handle).isas()
    print(f"instruction sets here: {here}; not tested: {sorted({*ISAS[1:]} - {*here})}")
    return {isa: Native(handle, Options(isa)) for isa in here}


def lists_of(
    hyper: Hyper, sizes: tuple[int, ...], kinds: tuple[torch.dtype, ...] = (F, F, F), copy: Any = None
) -> StepLists:
    """Parameters, gradients, states in `kinds`; what has to be positive is."""
    generator = torch.Generator().manual_seed(sum(sizes))
    param, grad, state = kinds

    def drawn(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, generator=generator).to(dtype) for n in sizes]

    states = [drawn(state) for _ in hyper.used()]
    for name, part in zip(hyper.used(), states, strict=True):
        part[:] = [t.square() for t in part] if name in ("exp_avg_sqs", "sums") else part
    return StepLists(drawn(param), drawn(grad), states, [7] * len(sizes), drawn(copy) if copy else [])


def run(native: Native | None, lists: StepLists, hyper: Hyper, **extra: Any) -> StepLists:
    """One step by the reference, or by the library under one instruction set."""
    kernel = registry().kernels[hyper.op]
    function: Step = kernel.reference
    if native is not None:
        assert kernel.native is not None
        function = kernel.native(native)
    states = [*lists.states, *([] for _ in hyper.states[len(lists.states) :])]
    function(
        lists.params, lists.grads, *states, lists.copies, lists.saved, lists.steps, **asdict(hyper), **extra
    )
    return lists


def same(mine: StepLists, theirs: StepLists) -> None:
    for left, right in zip(every(mine), every(theirs), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def every(lists: StepLists) -> list[Tensor]:
    return [*lists.params, *lists.grads, *(t for part in lists.states for t in part), *lists.copies]


# -- the same bits -----------------------------------------------------------------------------------------


def test_streaming_stores_write_the_same(natives: dict[str, Native]) -> None:
    """Above four million elements copies and keepers bypass the caches; unaligned ones and tails must not."""
    drawn = lists_of(ADAMW, (4_200_001,), (F, B, F), B)
    for offset in (0, 1):

        def made(offset: int = offset) -> StepLists:
            every_part = (drawn.params, drawn.grads, drawn.copies, *drawn.states)
            parts = [[t.clone()[offset:] for t in part] for part in every_part]
            saved = [torch.zeros(t.numel() + offset)[offset:] for k in (0, 3, 4) for t in parts[k]]
            return StepLists(parts[0], parts[1], parts[3:], [7], parts[2], saved)

        wanted = run(None, made(), ADAMW)
        for native in list(natives.values())[-2:]:
            mine = run(native, made(), ADAMW)
            same(mine, wanted)
            kept = [t[offset:] for t in (*drawn.params, *(t for part in drawn.states for t in part))]
            assert all(torch.equal(a, b) for a, b in zip(mine.saved, kept, strict=True))


@pytest.mark.parametrize("hyper", ELEMENTWISE, ids=name_of)
@pytest.mark.parametrize("seed", [None, 3])
def test_threads_and_cuts_do_not_change_a_bit(
    natives: dict[str, Native], hyper: Hyper, seed: int | None
) -> None:
    """A whole tensor, or views of any parts of it in any order: the same bits, as shards and ranges need.

    With a seed too: the chance of rounding is drawn from values, not from places.
    """
    kinds = (F, B, F) if seed is None else (B, B, B)
    cuts = (0, 1, 1014, 1015, 40_000, 70_001, 70_003)
    whole, cut = (lists_of(hyper, (70_003,), kinds, None if seed else B) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(list(natives.values())[-1], whole, hyper, seed=seed)
    finally:
        torch.set_num_threads(before)
    for begin, end in reversed([*pairwise(cuts)]):
        parts = [[t[begin:end] for t in part] for part in (cut.params, cut.grads, cut.copies, *cut.states)]
        optim_step_(StepLists(parts[0], parts[1], parts[3:], [7], parts[2]), hyper, seed=seed)
    same(cut, whole)


@pytest.mark.parametrize("hyper", [HYPERS[-1]], ids=name_of)
def test_threads_do_not_change_a_bit_of_lamb(natives: dict[str, Native], hyper: Hyper) -> None:
    """The norms are summed in one order, whatever the threads and the instruction set."""
    sizes, before = (70_003, 5, 0, 33_000), torch.get_num_threads()
    found = []
    for threads, native in product((1, 3), natives.values()):
        torch.set_num_threads(threads)
        try:
            found.append(run(native, lists_of(hyper, sizes, (F, B, F), B), hyper))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("hyper", ELEMENTWISE, ids=name_of)
def test_special_values(natives: dict[str, Native], hyper: Hyper) -> None:
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

        def made(param: torch.dtype = param, grad: torch.dtype = grad, copy: Any = copy) -> StepLists:
            p, g = values.repeat_interleave(values.numel()), values.repeat(values.numel())
            states = [[torch.zeros_like(p)] for _ in hyper.used()]
            return StepLists([p.to(param)], [g.to(grad)], states, [1], [torch.empty_like(p, dtype=copy)])

        wanted = run(None, made(), hyper)
        for native in natives.values():
            same(run(native, made(), hyper), wanted)


def test_every_half_converts_exactly(natives: dict[str, Native]) -> None:
    """All 65536 patterns of both formats, in and out: with lr 0 a step is a conversion and nothing else."""
    every_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, native in product(DTYPES[1:], natives.values()):
        p, zeros = every_pattern.view(dtype).clone(), torch.zeros(2**16)
        lists = StepLists([p], [zeros], [], [1], [torch.empty(p.numel())])
        run(native, lists, SgdHyper(lr=0.0))
        for out in (p.float(), lists.copies[0]):
            assert torch.allclose(out, every_pattern.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_rounding_is_to_nearest_even(natives: dict[str, Native]) -> None:
    """Values halfway between two neighbours, just below and just above, against torch's own conversion."""
    for dtype in DTYPES[1:]:
        below = torch.arange(0, 2**15 - 2**11, 3, dtype=torch.int32).to(torch.int16).view(dtype).double()
        above = torch.arange(1, 2**15 - 2**11 + 1, 3, dtype=torch.int32).to(torch.int16).view(dtype).double()
        middle = ((below + above) / 2).float()
        middle = middle[middle.isfinite() & (middle.abs() > 1e-37)]
        near = [middle.nextafter(torch.tensor(limit)) for limit in (0.0, 1e38)]
        values = torch.cat([middle, *near, -middle])
        for native in natives.values():
            copy, zeros = torch.empty(values.numel(), dtype=dtype), torch.zeros(values.numel())
            run(native, StepLists([values.clone()], [zeros], [], [1], [copy]), SgdHyper(lr=0.0))
            assert torch.equal(copy, values.to(dtype))


def layouts() -> Iterator[tuple[str, StepLists]]:
    """Lists that are not plainly contiguous: one shared dense layout, mixed ones, and gaps."""

    def made(shape: tuple[int, ...], change: Callable[[Tensor], Tensor], grad: Any, copy: bool) -> StepLists:
        generator = torch.Generator().manual_seed(3)
        p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
        out = [torch.zeros(p.numel(), dtype=B).view(shape)] if copy else []
        return StepLists([change(p)], [grad(g)], [[change(m)], [change(v.square())]], [7], out)

    last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
    plain = lambda t: t  # noqa: E731
    yield "channels_last", made((2, 5, 3, 3), last, last, False)
    yield "channels_last with a contiguous gradient", made((2, 5, 3, 3), last, plain, True)
    yield "transposed", made((5, 7), lambda t: t.t().contiguous().t(), plain, True)
    yield "every second", made((9, 8), lambda t: torch.stack([t, t], -1)[..., 0], plain, True)
    yield "expanded gradient", made((6, 4), plain, lambda t: t[:, :1].expand(6, 4), True)


@pytest.mark.parametrize("hyper", [ADAMW, LambHyper(lr=0.0, eps=1.0)], ids=["adam", "lamb"])
@pytest.mark.parametrize("which", range(5))
def test_layouts(natives: dict[str, Native], which: int, hyper: Hyper) -> None:
    wanted = run(None, list(layouts())[which][1], hyper)
    for native in natives.values():
        lists = list(layouts())[which][1]
        plain = lists_of(hyper, (5, 40), copy=B if lists.copies else None)
        parts = [[*a, *b] for a, b in zip(
            (plain.params, plain.grads, plain.copies, *plain.states),
            (lists.params, lists.grads, lists.copies, *lists.states), strict=True)]  # fmt: skip
        run(native, StepLists(parts[0], parts[1], parts[3:], [7] * 3, parts[2]), hyper)
        same(lists, wanted)


# -- against others ----------------------------------------------------------------------------------------


def twin(hyper: Hyper, param: Tensor) -> torch.optim.Optimizer:
    """torch's optimizer of the same rule."""
    numbers = {"lr": hyper.lr, "weight_decay": hyper.weight_decay, "maximize": hyper.maximize}
    if isinstance(hyper, AdamHyper):
        kind = torch.optim.AdamW if hyper.decoupled else torch.optim.Adam
        return kind([param], betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, **numbers)
    if isinstance(hyper, AdagradHyper):
        return torch.optim.Adagrad([param], lr_decay=hyper.lr_decay, eps=hyper.eps, **numbers)
    assert isinstance(hyper, SgdHyper)
    names = ("momentum", "dampening", "nesterov")
    return torch.optim.SGD([param], **{n: getattr(hyper, n) for n in names}, **numbers)


IN_TORCH: list[Hyper] = [
    *(AdamHyper(lr=1e-2, weight_decay=0.1, decoupled=d, maximize=not d) for d in (True, False)),
    AdagradHyper(lr=1e-2, weight_decay=0.1, lr_decay=0.05, maximize=True),
    SgdHyper(lr=1e-2, weight_decay=0.1),
    SgdHyper(lr=1e-2, weight_decay=0.1, momentum=0.9, dampening=0.2, maximize=True),
    SgdHyper(lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True),
]  # fmt: skip


@pytest.mark.parametrize("hyper", IN_TORCH, ids=lambda hyper: type(hyper).__name__)
def test_hundred_steps_against_torch(hyper: Hyper) -> None:
    """Against torch's rule in fp64: relative distance at most 4e-6.

    The factor 1 - lr * weight_decay is off by 2^-25 at most, the same way each step: 100 * 2^-25 = 3e-6; two
    roundings a step, of 2^-24, go either way: sqrt(200) * 2^-24 = 8e-7.
    """
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(4099, generator=generator)
    theirs = mine.double().requires_grad_()
    optimizer = twin(hyper, theirs)
    states = [[torch.zeros_like(mine)] for _ in hyper.used()]
    for step in range(1, 101):
        grad = torch.randn(mine.shape, generator=generator) * 0.1
        theirs.grad = grad.double()
        optimizer.step()
        optim_step_(StepLists([mine], [grad], states, [step]), hyper)
    kept = [t for name, t in optimizer.state[theirs].items() if name != "step"]
    for a, b in zip([mine, *(part[0] for part in states)], [theirs.detach(), *kept], strict=False):
        assert (a - b).norm() <= 4e-6 * b.norm()


@pytest.mark.parametrize(
    "hyper", [LionHyper(lr=1e-3, weight_decay=0.1), LambHyper(lr=1e-2, weight_decay=0.1)]
)
def test_hundred_steps_against_the_paper(hyper: LionHyper | LambHyper) -> None:
    """The papers' programs in fp64, written down plainly; torch has neither. Bounds as above."""
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(4099, generator=generator)
    x, m, v = mine.double(), torch.zeros(4099).double(), torch.zeros(4099).double()
    states = [[torch.zeros_like(mine)] for _ in hyper.used()]
    for step in range(1, 101):
        grad = torch.randn(mine.shape, generator=generator) * 0.1
        g = grad.double()
        if isinstance(hyper, LionHyper):
            c = hyper.beta1 * m + (1 - hyper.beta1) * g
            x = x - hyper.lr * (torch.sign(c) + hyper.weight_decay * x)
            m = hyper.beta2 * m + (1 - hyper.beta2) * g
        else:
            m = hyper.beta1 * m + (1 - hyper.beta1) * g
            v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
            r = (m / (1 - hyper.beta1**step)) / ((v / (1 - hyper.beta2**step)).sqrt() + hyper.eps)
            r = r + hyper.weight_decay * x
            x = x - hyper.lr * float((x.norm() / r.norm()).clamp(hyper.min_coeff, hyper.max_coeff)) * r
        optim_step_(StepLists([mine], [grad], states, [step]), hyper)
    assert (mine - x).norm() <= 4e-6 * x.norm()
    assert (states[0][0] - m).norm() <= 1e-6 * m.norm()


def test_trust_ratios() -> None:
    """Held within its limits, and 1 for a tensor of zeros."""
    for scale, wanted in ((1e6, 2.0), (1e-6, 0.5), (0.0, 1.0)):
        p, m, v = torch.full((64,), scale), torch.zeros(64), torch.zeros(64)
        before = p.clone()
        hyper = LambHyper(lr=0.125, min_coeff=0.5, max_coeff=2.0, eps=0.0)
        optim_step_(StepLists([p], [torch.ones(64)], [[m], [v]], [1]), hyper)
        assert torch.allclose(
            before - p, torch.full((64,), wanted * 0.125), rtol=0, atol=0.13 if scale > 1 else 1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_parameters_stay_within_their_rounding(dtype: torch.dtype) -> None:
    """Each step rounds once, by at most u * |p| (u: half an ulp of 1); the update itself is computed in fp32.

    The update depends on p only through weight decay (factor 1 - lr * wd <= 1), so after T steps the distance
    to the fp32 run on the same gradients is at most T roundings: T * u * max|p| (+ fp16's least subnormal).
    """
    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(2049, generator=generator).to(dtype)
    full = low.float()
    states = [[[torch.zeros(2049)] for _ in range(2)] for _ in range(2)]
    biggest = full.abs()
    for step in range(1, 51):
        grad = torch.randn(2049, generator=generator).to(dtype)
        for param, state in zip((low, full), states, strict=True):
            optim_step_(StepLists([param], [grad], state, [step]), ADAMW)
        biggest = torch.maximum(biggest, torch.maximum(full.abs(), low.float().abs()))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*states, strict=True))
    assert ((low.float() - full).abs() <= 50 * (unit * 1.01 * biggest + 2.0**-25)).all()
    assert not torch.equal(low.float(), full)


# -- rounding by chance ------------------------------------------------------------------------------------


def test_rounding_by_chance_is_right_in_the_mean() -> None:
    """A value's mean over n seeds: within 5 standard errors, of at most half a bf16 unit / sqrt(n)."""
    values = torch.tensor([1.0, 1.001, 1.0039, -3.3e-5, 0.1, 7e-39, 3.3e38, -0.7]).repeat(
        64, 1
    ) * torch.linspace(0.9, 1.0, 64).unsqueeze(1)
    kept, total, n = values.to(B), torch.zeros_like(values, dtype=torch.float64), 400
    for seed in range(n):
        narrow_([kept], [values], seeds("test", seed, 0)[0])
        assert ((kept.float() - values).abs() <= 2.0**-7 * values.abs() + 1e-40).all()
        total += kept.double()
    error = (total / n - values.double()) / (values.double().abs() * 2.0**-7 + 2.0**-133)
    assert error.abs().max() <= 5 * 0.5 / n**0.5
    edge = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0])
    narrow_([kept[0][:6]], [edge], 1)
    assert torch.allclose(kept[0][:6].float(), edge, rtol=0, atol=0, equal_nan=True)


def test_bf16_second_moments_move_only_by_chance() -> None:
    """v * 0.999 is nearer to v than to its neighbour in bf16: rounded to nearest it stands still for ever."""
    after = {}
    for seed in (None, 5):
        m, v, p = torch.zeros(4096, dtype=B), torch.linspace(1, 2, 4096).to(B), torch.zeros(4096)
        for step in range(200):
            lists = StepLists([p], [torch.zeros(4096)], [[m], [v]], [step + 1])
            optim_step_(lists, AdamHyper(lr=1e-3), seed=None if seed is None else seed + step)
        after[seed] = v.double().mean() / torch.linspace(1, 2, 4096).double().mean()
    assert abs(after[None] - 1.0) < 1e-3
    assert abs(after[5] - 0.999**200) < 4e-3  # 0.8186; neighbours share a draw, so some 60 are independent


# -- undo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", HYPERS, ids=name_of)
@pytest.mark.parametrize("kinds", [(F, B, F), (B, B, B)], ids=["fp32", "bf16"])
def test_undo_restores_every_bit(hyper: Hyper, kinds: tuple[torch.dtype, ...]) -> None:
    lists, before = (lists_of(hyper, (0, 5, 4099, 40_000), kinds) for _ in range(2))
    tensors = [*lists.params, *(t for part in lists.states for t in part)]
    tensors[1][0] = before.params[1][0] = float("nan")
    lists = replace(lists, saved=[torch.empty_like(t) for t in tensors])
    optim_step_(lists, hyper)
    assert not torch.equal(lists.params[2], before.params[2])
    undo_step_(lists)
    same(replace(lists, saved=[]), before)
    with pytest.raises(ValueError, match="undo_step_: saved has 0 tensors"):
        undo_step_(before)


# -- torch's ground and bad calls --------------------------------------------------------------------------


def test_autograd_notices_the_write() -> None:
    """A graph that saved a parameter before the step must not be run backward after it."""
    p = torch.ones(4, requires_grad=True)
    loss = (p * p).sum()
    optim_step_(StepLists([p], [torch.ones(4)], [[torch.zeros(4)], [torch.zeros(4)]], [1]), ADAMW)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_into_one_graph() -> None:
    def step(*lists: list[Tensor]) -> None:
        OPS["adam_step_"](*lists, [], [7, 7], **asdict(ADAMW))

    wanted, mine = (lists_of(ADAMW, (5, 33), (F, B, F), B) for _ in range(2))
    run(None, wanted, ADAMW)
    args = (mine.params, mine.grads, *mine.states, mine.copies)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    same(mine, wanted)


def bad(**change: Any) -> StepLists:
    return replace(lists_of(ADAMW, (4, 6), copy=B), **change)


ZEROS = [torch.zeros(4), torch.zeros(6)]
WRONG = {
    "exp_avgs has 1 entries, params has 2": bad(states=[[torch.zeros(4)], ZEROS]),
    r"grads\[1\] is shape \(5,\)": bad(grads=[torch.zeros(4), torch.zeros(5)]),
    r"exp_avgs\[0\] is shape \(2, 2\)": bad(states=[[torch.zeros(2, 2), torch.zeros(6)], ZEROS]),
    r"exp_avg_sqs\[0\] is .*int32": bad(states=[ZEROS, [z.int() for z in ZEROS]]),
    r"grads\[1\] is .*bfloat16": bad(grads=[torch.zeros(4), torch.zeros(6, dtype=B)]),
    r"copies\[0\] is .*int32": bad(copies=[z.int() for z in ZEROS]),
    r"grads\[1\] is .*sparse": bad(grads=[torch.zeros(4), torch.zeros(6).to_sparse()]),
    r"grads\[0\] is .*meta": bad(grads=[torch.zeros(4, device="meta"), torch.zeros(6)]),
    r"steps\[1\]=0": bad(steps=[1, 0]),
    "saved has 2 entries; wanted: none, or 2 for each of params, exp_avgs, exp_avg_sqs": bad(saved=ZEROS),
    r"saved \(exp_avgs\)\[0\] is .*bfloat16": bad(saved=[*ZEROS, *(z.bfloat16() for z in ZEROS), *ZEROS]),
    "start at the same address": bad(states=[ZEROS, ZEROS]),
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_a_value_error(natives: dict[str, Native], words: str) -> None:
    for native in (None, *natives.values()):
        with pytest.raises(ValueError, match=words):
            run(native, WRONG[words], ADAMW)


def test_bad_numbers() -> None:
    for name, value in (("lr", -1.0), ("beta1", 1.0), ("beta2", -0.1), ("eps", -1e-8), ("lr", float("inf"))):
        with pytest.raises(ValueError, match=name):
            AdamHyper(**{"lr": 1e-3, name: value})
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        SgdHyper(lr=0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"max_coeff=0\.001 is not allowed: it must be >= min_coeff"):
        LambHyper(lr=0.1, max_coeff=0.001)
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        optim_step_(lists_of(ADAMW, (4,)), ADAMW, seed=-1)
    lists = lists_of(HYPERS[4], (4,))
    with pytest.raises(ValueError, match="momentum_buffers has 1 entries; without momentum it has none"):
        optim_step_(lists, SgdHyper(lr=0.1))


def test_missing_instruction_set_is_an_error() -> None:
    handle = open_library("optim").handle
    absent = next(isa for i, isa in enumerate(ISAS) if i and not handle.ds_has_isa(i))
    with pytest.raises(ValueError, match="no such instruction set"):
        Native(handle, Options(absent))
    with pytest.raises(ValueError, match="sse9"):
        Options("sse9")
