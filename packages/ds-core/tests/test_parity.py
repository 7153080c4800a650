"""The twin equals torch's own training, on one rank and against DDP on two; the comparison is not fooled."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, split
from ds_core.testing.parity import Twin, assert_close_norm, relative_error


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("name", CASES)
def test_cases_are_deterministic_and_leave_the_random_state_alone(name: str) -> None:
    case, before = CASES[name], torch.random.get_rng_state()
    first, second = case.build(), case.build()
    assert_close_norm(dict(first.named_parameters()), dict(second.named_parameters()), 0.0)
    batch = case.make_batch(3, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(batch[k], v) for k, v in case.make_batch(3, 4).items())
    parts = [case.rank_batch(3, rank, 4) for rank in range(4)]
    assert all(torch.equal(torch.cat([p[k] for p in parts]), v) for k, v in batch.items())
    assert {p[k].shape for p in parts for k in p} == {parts[0][k].shape for k in parts[0]}


def test_cases_have_the_corners_they_are_named_for() -> None:
    models = {name: case.build() for name, case in CASES.items()}
    tied = dict(models["tied"].named_parameters(remove_duplicate=False))
    assert tied["head.weight"] is tied["embed.weight"]
    blocks = dict(models["tied_blocks"].blocks.named_parameters(remove_duplicate=False))
    assert blocks["2.up.weight"] is blocks["0.up.weight"]
    assert len({p.requires_grad for p in models["frozen"].blocks[1].parameters()}) == 2
    assert sum(p.numel() for p in models["few_elements"].parameters()) == 4
    assert {p.dtype for p in models["mixed_dtypes"].blocks[0].parameters()} == {torch.float32, torch.float64}
    grads = Twin(CASES["unused"], sgd, zero_unused=False).step([CASES["unused"].make_batch(0, 1)]).grads
    missing = {n for n, _ in models["unused"].named_parameters()} - grads.keys()
    assert "blocks.0.idle" in missing
    assert {n.split(".")[0] for n in missing} == {"blocks", "spare"}


@pytest.mark.parametrize("name", CASES)
def test_on_one_rank_the_twin_is_plain_torch(name: str) -> None:
    case = CASES[name]
    twin = Twin(case, adamw, max_norm=0.5, zero_unused=False)
    model = case.build()
    optimizer = adamw(model)
    for seed in range(2):
        batches = [case.make_batch(10 * seed + i, 1) for i in range(2)]
        report = twin.step(batches)
        for batch in batches:
            (sum(case.losses(model, batch)) / 2).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert_close_norm(report.grads, grads, 1e-6)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    # Adam's first steps are nearly the sign of the gradient, so rounding there is not damped.
    assert_close_norm(twin.parameters(), dict(model.named_parameters()), 1e-5)
    assert len(twin.state()) == 3 * len(grads)


@pytest.mark.parametrize("name", ["mlp", "tied", "frozen", "two_losses", "unused_on_one_rank"])
@distributed(world_size=2)
def test_on_two_ranks_the_twin_is_ddp(rank: int, world: int, name: str) -> None:
    case = CASES[name]
    model = case.build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=name == "unused_on_one_rank")
    sum(case.losses(wrapped, case.rank_batch(5, rank, world))).backward()
    report = Twin(case, sgd, ranks=world).step([case.make_batch(5, world)])
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close_norm(got, report.grads, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_parameters_and_gradients_but_not_masters(dtype: torch.dtype) -> None:
    case = CASES["tied"]
    exact, rounded = Twin(case, sgd), Twin(case, sgd, dtype=dtype, loss_scale=8.0)
    batch = case.make_batch(0, 1)
    want, got = exact.step([batch]), rounded.step([batch])
    error = relative_error(got.grads["embed.weight"], want.grads["embed.weight"])
    assert torch.finfo(dtype).eps / 16 < error < 16 * torch.finfo(dtype).eps
    assert all(
        g.dtype == torch.float32 and bool((g * 8 == (g * 8).to(dtype)).all()) for g in got.grads.values()
    )
    before = case.build().state_dict()
    stepped = {n: before[n] - 0.1 * got.grads[n] for n in got.grads}
    assert_close_norm(rounded.parameters(), stepped, 1e-7)


def test_an_overflow_skips_the_step() -> None:
    case = CASES["mlp"]
    twin = Twin(case, sgd, dtype=torch.float16, loss_scale=2.0**40)
    before = twin.parameters()
    assert twin.step([case.make_batch(0, 1)]).skipped
    assert_close_norm(twin.parameters(), before, 0.0)


def test_the_comparison_finds_what_is_wrong_and_names_it() -> None:
    want = {"a": torch.ones(4), "b": torch.zeros(2)}

    def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        got = copy.deepcopy(want)
        got[key] = change(got[key])
        return got

    assert_close_norm(want, copy.deepcopy(want), 0.0)
    assert_close_norm(changed("a", lambda t: t + 1e-6), want, 2e-6)
    for got in (changed("a", lambda t: t + 1e-4), changed("a", lambda t: t * torch.nan)):
        with pytest.raises(AssertionError, match=r"in 1 of 2 tensors\n  a: "):
            assert_close_norm(got, want, 1e-5)
    with pytest.raises(AssertionError, match="b: inf"):
        assert_close_norm(changed("b", lambda t: t + 1e-30), want, 1e-5)
    with pytest.raises(AssertionError, match=r"shape \(2,\) instead of \(4,\)"):
        assert_close_norm(changed("a", lambda t: t[:2]), want, 1e-5)
    with pytest.raises(AssertionError, match=r"missing: \['b'\], unexpected: \['c'\]"):
        assert_close_norm({"a": want["a"], "c": want["b"]}, want, 1e-5)


def test_split_by_rank_matches_the_flags() -> None:
    parts = split(CASES["unused_on_one_rank"].make_batch(0, 4), 4)
    assert [bool(part["use"].any()) for part in parts] == [False, True, False, True]
