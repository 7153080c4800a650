"""Steps past the dispatcher: taken when nothing changed, and never with numbers of what was there before."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_kernels import FusedAdagrad, FusedAdamW, FusedLamb, FusedLion, FusedOptimizer, FusedSGD, load
from ds_kernels.ops.optim.repeat import Ready

SIZES = ((8, 8), (33,), (3, 5, 7), (0,))
B, H = torch.bfloat16, torch.float16
Change = Callable[[FusedOptimizer], object]


@pytest.fixture(scope="module", autouse=True)
def loaded(own_cache: None) -> None:
    load("optim", torch.device("cpu"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Ready]:
    """The steps that went past the dispatcher."""
    taken: list[Ready] = []
    run = Ready.run

    def noted(self: Ready, *args: Any) -> None:
        taken.append(self)
        run(self, *args)

    monkeypatch.setattr(Ready, "run", noted)
    return taken


def made(kind: Any = FusedAdamW, dtype: torch.dtype = torch.float32, **settings: Any) -> FusedOptimizer:
    generator = torch.Generator().manual_seed(0)
    drawn = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    optimizer: FusedOptimizer = kind(drawn, **{"lr": 0.01, "weight_decay": 0.1, **settings})
    return optimizer


def params(optimizer: FusedOptimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def fill(optimizer: FusedOptimizer, step: int) -> None:
    """New gradients, in memory of their own."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def first(optimizer: FusedOptimizer) -> tuple[nn.Parameter, dict[str, Tensor]]:
    param = params(optimizer)[0]
    return param, optimizer.state[param]


def compare(one: FusedOptimizer, two: FusedOptimizer) -> None:
    for p, q in zip(params(one), params(two), strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q)
        assert one.state[p].keys() == two.state[q].keys()
        for name, value in one.state[p].items():
            assert torch.equal(value, two.state[q][name]), name
    for copy_one, copy_two in zip(one.copy_out.values(), two.copy_out.values(), strict=True):
        assert torch.equal(copy_one, copy_two)


def through_the_op(optimizer: FusedOptimizer) -> None:
    optimizer._batched.clear()
    optimizer.step()


SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}), (FusedAdamW, {"maximize": True}), (FusedAdagrad, {"lr_decay": 0.1}), (FusedLion, {}),
    (FusedSGD, {"momentum": 0.9, "dampening": 0.3}), (FusedSGD, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, B])
def test_repeated_steps_are_the_steps_of_the_op(
    runs: list[Ready], kind: Any, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """With a copy, scaled gradients and a schedule; bf16 rounded by chance; two dtypes in a group."""
    one, two = (made(kind, dtype, **settings) for _ in range(2))
    for optimizer in (one, two):
        optimizer.seed = 7 if dtype == B else None
        optimizer.copy_out[params(optimizer)[0]] = torch.zeros(64, dtype=H)
        optimizer.param_groups[0]["params"].insert(1, nn.Parameter(torch.ones(5, dtype=H)))
    for step in range(5):
        for optimizer in (one, two):
            fill(optimizer, step)
            optimizer.grad_scale, optimizer.clip_coef = 2.0**step, torch.tensor(0.5)
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        one.step()
        through_the_op(two)
        compare(one, two)
    assert one.seed == two.seed
    assert len(runs) == 4 * 3  # a copy, fp16, the others: three batches


def test_lamb_and_undo_take_the_op(runs: list[Ready]) -> None:
    lamb, kept = made(FusedLamb), made()
    for step in range(4):
        kept.keep_undo = step != 1
        for optimizer in (lamb, kept):
            fill(optimizer, step)
            optimizer.step()
    kept.undo()
    assert first(kept)[1]["step"] == 3
    assert not runs


def resized(optimizer: FusedOptimizer) -> None:
    """All tensors of a parameter become their own first half, at the addresses that they had."""
    param, state = first(optimizer)
    param.data = param.data[:4]
    param.grad = torch.ones(4, 8)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].data = state[name].data[:4]


def transposed(optimizer: FusedOptimizer) -> None:
    param, _ = first(optimizer)
    param.data = param.data.t()


def moved(optimizer: FusedOptimizer) -> None:
    """A new storage of the same content; the old one is overwritten to be found out."""
    for param in params(optimizer):
        old = param.data
        param.data = old.clone()
        old.fill_(float("nan"))


def states_replaced(optimizer: FusedOptimizer) -> None:
    for param in params(optimizer):
        optimizer.state[param] = {name: value.clone() + 1 for name, value in optimizer.state[param].items()}


def state_set(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def run(optimizer: FusedOptimizer) -> None:
        for param in params(optimizer):
            optimizer.state[param][name] = change(optimizer.state[param][name])

    return run


def state_moved(optimizer: FusedOptimizer) -> None:
    state = first(optimizer)[1]
    state["exp_avg"].data = state["exp_avg"].data.clone() + 1


def step_filled(optimizer: FusedOptimizer) -> None:
    first(optimizer)[1]["step"].fill_(41)


def step_data(optimizer: FusedOptimizer) -> None:
    first(optimizer)[1]["step"].data = torch.tensor(17.0)


def no_gradient(optimizer: FusedOptimizer) -> None:
    first(optimizer)[0].grad = None


def expanded_gradient(optimizer: FusedOptimizer) -> None:
    param = first(optimizer)[0]
    param.grad = torch.arange(8.0)[:, None].expand(8, 8)


def negated_gradient(optimizer: FusedOptimizer) -> None:
    param = first(optimizer)[0]
    param.grad = torch._neg_view(torch.ones(8, 8))


def low_gradients(optimizer: FusedOptimizer) -> None:
    optimizer.low_precision_grads = {p: torch.full(p.shape, 0.5, dtype=B) for p in params(optimizer)}


def one_low_gradient(optimizer: FusedOptimizer) -> None:
    optimizer.low_precision_grads = {params(optimizer)[1]: torch.full((33,), 0.5, dtype=H)}


def copies(dtype: torch.dtype) -> Change:
    def run(optimizer: FusedOptimizer) -> None:
        optimizer.copy_out = {p: torch.zeros(p.numel(), dtype=dtype) for p in params(optimizer)}

    return run


def one_copy(optimizer: FusedOptimizer) -> None:
    optimizer.copy_out = {params(optimizer)[2]: torch.zeros(105, dtype=B)}


def new_parameter(optimizer: FusedOptimizer) -> None:
    optimizer.param_groups[0]["params"][1] = fresh = nn.Parameter(torch.full((33,), 2.0))
    fresh.grad = torch.ones(33)


def reordered(optimizer: FusedOptimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def new_group(optimizer: FusedOptimizer) -> None:
    fresh = nn.Parameter(torch.full((9,), 2.0))
    fresh.grad = torch.ones(9)
    optimizer.add_param_group({"params": [fresh], "lr": 1.0})


def split_groups(optimizer: FusedOptimizer) -> None:
    group = optimizer.param_groups[0]
    optimizer.param_groups.insert(0, {**group, "params": [group["params"].pop()]})


def loaded_state(optimizer: FusedOptimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] += 3
    optimizer.load_state_dict(saved)


CHANGES: dict[str, Change] = {
    "resized": resized,
    "transposed": transposed,
    "moved": moved,
    "states replaced": states_replaced,
    "a moment replaced": state_set("exp_avg", lambda t: t.clone() + 1),
    "moments in bf16": state_set("exp_avg_sq", lambda t: t.to(B)),
    "a moment moved": state_moved,
    "a count filled": step_filled,
    "a count's data": step_data,
    "counts replaced": state_set("step", lambda t: torch.tensor(9.0)),
    "no gradient": no_gradient,
    "expanded gradient": expanded_gradient,
    "negated gradient": negated_gradient,
    "bf16 gradients": low_gradients,
    "an fp16 gradient": one_low_gradient,
    "bf16 copies": copies(B),
    "fp32 copies": copies(torch.float32),
    "one copy": one_copy,
    "new parameter": new_parameter,
    "reordered": reordered,
    "new group": new_group,
    "groups split": split_groups,
    "loaded": loaded_state,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_noticed(runs: list[Ready], name: str) -> None:
    """Two steps, a change, and steps after it: as an optimizer that takes nothing for granted makes them."""
    one, two = made(), made()
    for optimizer, step in ((one, one.step), (two, lambda: through_the_op(two))):
        for number in range(2):
            fill(optimizer, number)
            step()
        fill(optimizer, 2)
        CHANGES[name](optimizer)
        step()
    unharmed = ("a count filled", "new group")  # counts are read where they are; the old group is as it was
    assert len(runs) == (2 if name in unharmed else 1)
    compare(one, two)
    for optimizer, step in ((one, one.step), (two, lambda: through_the_op(two))):
        for number in range(3, 5):
            fill(optimizer, number)
            step()
    compare(one, two)


def test_sixteen_bits_read_another_way() -> None:
    """bf16 parameters become fp16 at the same addresses, of the same length."""
    one, two = made(dtype=B), made(dtype=B)
    for optimizer, step in ((one, one.step), (two, lambda: through_the_op(two))):
        for number in range(4):
            if number == 2:
                for param in params(optimizer):
                    param.grad = None
                    param.data = param.data.view(H)
            fill(optimizer, number)
            step()
    assert params(one)[0].dtype == H
    compare(one, two)


def test_copies_that_change() -> None:
    """Other memory, another dtype, fewer: the old ones are left alone."""
    optimizer = made()
    old = [torch.zeros(p.numel(), dtype=B) for p in params(optimizer)]
    optimizer.copy_out = dict(zip(params(optimizer), old, strict=True))
    for number in range(2):
        fill(optimizer, number)
        optimizer.step()
    kept = [t.clone() for t in old]
    for number, dtype in ((2, B), (3, H)):
        new = {p: torch.zeros(p.numel(), dtype=dtype) for p in params(optimizer)}
        optimizer.copy_out = new
        fill(optimizer, number)
        optimizer.step()
        assert all(torch.equal(t, p.detach().flatten().to(dtype)) for p, t in new.items())
    optimizer.copy_out = {}
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))
    assert not torch.equal(old[0], params(optimizer)[0].detach().flatten().to(B))


def wrong_low(made_of: Callable[[nn.Parameter], Tensor]) -> Change:
    def run(optimizer: FusedOptimizer) -> None:
        optimizer.low_precision_grads = {params(optimizer)[0]: made_of(params(optimizer)[0])}

    return run


def shared(optimizer: FusedOptimizer) -> None:
    state = first(optimizer)[1]
    state["exp_avg_sq"] = state["exp_avg"]


def integers(optimizer: FusedOptimizer) -> None:
    state = first(optimizer)[1]
    state["exp_avg"].data = state["exp_avg"].data.view(torch.int32)


def shrunk(optimizer: FusedOptimizer) -> None:
    state = first(optimizer)[1]
    state["exp_avg"].data = state["exp_avg"].data[:7]


WRONG: dict[str, tuple[Change, str]] = {
    "short gradient": (wrong_low(lambda p: torch.ones(63)), r"grads\[0\] is shape \(63,\)"),
    "meta gradient": (wrong_low(lambda p: torch.ones(8, 8, device="meta")), r"grads\[0\] is .*meta"),
    "sparse gradient": (wrong_low(lambda p: torch.ones(8, 8).to_sparse()), "sparse"),
    "integer gradient": (wrong_low(lambda p: torch.ones(8, 8, dtype=torch.int32)), r"grads\[0\] is .*int32"),
    "shared moments": (shared, "start at the same address"),
    "integer moment": (integers, r"exp_avgs\[0\] is .*int32"),
    "short moment": (shrunk, r"exp_avgs\[0\] is shape \(7, 8\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_became_wrong_is_refused(runs: list[Ready], name: str) -> None:
    optimizer, (change, words) = made(), WRONG[name]
    for number in range(2):
        fill(optimizer, number)
        optimizer.step()
    before = params(optimizer)[1].clone()
    change(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(params(optimizer)[1], before)
    assert len(runs) == 1


def test_dispatch_modes_see_every_step(runs: list[Ready]) -> None:
    """And one that only watches changes nothing."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    optimizer, seen = made(), list[str]()
    for number in range(3):
        fill(optimizer, number)
        with Watch():
            optimizer.step()
    assert sum("adam_step_" in name for name in seen) == 3
    assert not runs


def test_momentum_that_starts_late(runs: list[Ready]) -> None:
    """SGD without momentum has no buffers; from the step on that has momentum, it does."""
    one, two = made(FusedSGD), made(FusedSGD)
    for number in range(4):
        for optimizer, step in ((one, one.step), (two, lambda: through_the_op(two))):
            optimizer.param_groups[0]["momentum"] = 0.9 if number >= 2 else 0.0
            fill(optimizer, number)
            step()
        compare(one, two)
    assert len(runs) == 2


def test_nothing_is_kept_alive() -> None:
    optimizer = made()
    for number in range(2):
        fill(optimizer, number)
        optimizer.step()
    param, state = first(optimizer)
    old = [weakref.ref(t) for t in (state["exp_avg"], param.grad)]
    state["exp_avg"], param.grad = torch.zeros(8, 8), None
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_counts_are_in_checkpoints_as_ever() -> None:
    """They are views of one tensor: saved, loaded by torch's optimizer, copied, they count on their own."""
    optimizer, theirs = made(), torch.optim.AdamW([nn.Parameter(p.detach()) for p in params(made())])
    for number in range(3):
        fill(optimizer, number)
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    theirs.load_state_dict(saved)
    for param in theirs.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    theirs.step()
    fill(twin, 3)
    twin.step()
    assert [state["step"].item() for state in theirs.state.values()] == [4.0] * len(SIZES)
    assert [state["step"].item() for state in twin.state.values()] == [4.0] * len(SIZES)
    assert [state["step"].item() for state in optimizer.state.values()] == [3.0] * len(SIZES)
    assert {state["step"].shape for state in saved["state"].values()} == {torch.Size([])}


def test_autograd_notices_a_repeated_step(runs: list[Ready]) -> None:
    optimizer = made()
    for number in range(2):
        fill(optimizer, number)
        optimizer.step()
    loss = (params(optimizer)[0] ** 2).sum()
    optimizer.step()
    assert len(runs) == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
