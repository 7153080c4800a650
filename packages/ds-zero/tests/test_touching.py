"""Looking at sharded parameters and writing them: allowed, gathered, or refused by name, never silent."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_core import ShardedOptimizer
from ds_core.state.absent import AbsentParameter, AbsentParameterError
from ds_core.state.owner import FlatOwner
from ds_core.state.unit import LostWriteError, Whole
from ds_core.testing.distributed import distributed
from ds_zero import (
    Zero,
    full_grad,
    full_optimizer_state,
    full_tensor,
    gather,
    set_full_optimizer_state,
    set_full_tensor,
)


class Tail(nn.Module):
    """Uses its embedding's weight a second time, outside of the embedding."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.functional = functional

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embed(ids))
        return F.linear(x, self.embed.weight) if self.functional else x


def build(
    stage: int, *, dtype: str | None = None, functional: bool = False
) -> tuple[Tail, ShardedOptimizer, FlatOwner]:
    torch.manual_seed(0)
    model = Tail(functional=functional)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    owner = Zero.model_validate({"stage": stage, "bucket_numel": 1, "dtype": dtype}).shard(model)
    return model, ShardedOptimizer(optimizer, owner), owner


IDS = torch.tensor([1, 2, 3])


@distributed(2)
def test_an_absent_parameter_says_what_it_is_and_no_more() -> None:
    model, _, _ = build(3)
    weight = model.embed.weight
    assert isinstance(weight, nn.Parameter)
    assert type(weight) is AbsentParameter
    assert (weight.shape, weight.numel(), weight.dtype, weight.dim()) == ((8, 4), 32, torch.float32, 2)
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.zeros_like(weight).shape == (8, 4)
    assert type(torch.zeros_like(weight)) is Tensor
    assert weight in {weight}
    assert "embed.weight" in repr(model.embed.weight)
    reads = [
        lambda: weight + 1,
        lambda: weight[0],
        lambda: F.linear(torch.ones(1, 4), weight),
        lambda: weight.data,
        lambda: weight.detach(),
        lambda: weight.to(torch.float64),
        lambda: torch.cat([torch.ones(1, 4), weight]),
        lambda: float(weight.sum()),
        lambda: weight.tolist(),
        lambda: weight.cpu().numpy(),
        lambda: copy.deepcopy(weight),
        lambda: weight.data_ptr(),
        lambda: weight.__reduce_ex__(2),
    ]
    for read in reads:
        with pytest.raises(
            AbsentParameterError, match=r"embed\.weight is sharded and not whole.*full_tensor"
        ):
            read()
    with torch.no_grad():
        for write in (
            lambda: weight.fill_(1),
            lambda: weight.zero_(),
            lambda: weight.copy_(torch.ones(8, 4)),
        ):
            with pytest.raises(AbsentParameterError, match=r"gather\(param\)"):
                write()
    with pytest.raises(AbsentParameterError, match="'data'"):
        weight.data = torch.ones(8, 4)


@pytest.mark.parametrize("by_hand", [False, True])
@distributed(2)
def test_a_weight_used_outside_its_module_is_gathered(by_hand: bool) -> None:
    model, optimizer, _ = build(3, functional=True)
    reference = Tail(functional=True)
    reference.load_state_dict(model.state_dict())
    with gather(model.embed.weight) if by_hand else contextlib.nullcontext():
        loss = model(IDS).square().mean()
        loss.backward()
    optimizer.step()
    plain = torch.optim.SGD(reference.parameters(), lr=0.5)
    reference(IDS).square().mean().backward()
    plain.step()
    for name, param in reference.named_parameters():
        torch.testing.assert_close(full_tensor(model.get_parameter(name)), param.detach())


@distributed(2)
def test_a_backward_that_needs_an_absent_weight_raises() -> None:
    model, optimizer, _ = build(3, functional=True)
    with gather(model.embed.weight):
        loss = model(IDS).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # outside: the weight is away
    optimizer.zero_grad()
    with gather(model.embed.weight):
        model(IDS).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_what_one_rank_writes_becomes_the_value(rank: int, stage: int, dtype: str | None) -> None:
    model, optimizer, owner = build(stage, dtype=dtype)
    with gather(model.blocks, write=1), torch.no_grad():
        model.blocks[0].weight.fill_(rank + 1)
        model.blocks[1].weight.data.fill_(3)  # through .data as well
    assert bool((full_tensor(model.blocks[0].weight) == 2).all())
    assert bool((full_tensor(model.blocks[1].weight) == 3).all())
    assert (owner.place(model.blocks[0].weight)[0].state is Whole.ABSENT) == (stage == 3)
    model(IDS).sum().backward()
    expected = 2 - 0.5 * _grad_of_first(model, stage)
    optimizer.step()
    torch.testing.assert_close(full_tensor(model.blocks[0].weight), expected)


def _grad_of_first(model: Tail, stage: int) -> Tensor:
    twin = Tail(functional=False).to(model.embed.weight.dtype)
    twin.load_state_dict(model.state_dict())
    twin(IDS).sum().backward()
    grad = twin.blocks[0].weight.grad
    assert grad is not None
    return grad


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_a_write_without_a_scope_is_refused(stage: int) -> None:
    model, optimizer, owner = build(stage, dtype="bfloat16")
    before = full_tensor(model.blocks[0].weight)
    with (
        pytest.raises(LostWriteError, match=r"blocks\.0\.weight was written in place.*write=0"),
        gather(model),
        torch.no_grad(),
    ):
        model.blocks[0].weight.mul_(2)
    if stage < 3:
        with torch.no_grad():
            model.blocks[0].weight.mul_(2)
        model(IDS).sum().backward()
        with pytest.raises(LostWriteError, match=r"blocks\.0\.weight"):
            optimizer.step()
    else:
        assert torch.equal(full_tensor(model.blocks[0].weight), before)
        assert owner.place(model.blocks[0].weight)[0].state is Whole.ABSENT


@distributed(2)
def test_nothing_is_taken_when_the_body_raises() -> None:
    model, _, _ = build(3)
    before = full_tensor(model.embed.weight)
    with contextlib.suppress(ArithmeticError), gather(model, write=0), torch.no_grad():
        model.embed.weight.zero_()
        raise ArithmeticError
    assert torch.equal(full_tensor(model.embed.weight), before)


@distributed(2)
def test_gather_refuses_strangers_and_ranks_that_are_not_there() -> None:
    model, _, _ = build(3)
    with pytest.raises(ValueError, match="rank from 0 to 1, got 2"), gather(model, write=2):
        pass
    with pytest.raises(LookupError, match="no parameter of a sharded model"), gather(torch.ones(2)):
        pass


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_gradients_and_state_are_whole_for_people(rank: int, stage: int, dtype: str | None) -> None:
    torch.manual_seed(0)
    model = Tail(functional=False)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    owner = Zero.model_validate({"stage": stage, "bucket_numel": 1, "dtype": dtype}).shard(model)
    ShardedOptimizer(optimizer, owner)
    assert full_grad(model.embed.weight) is None
    assert full_optimizer_state(optimizer, model.embed.weight, "exp_avg") is None
    model(IDS + rank).square().mean().backward()
    if dtype is not None:
        twin.to(torch.bfloat16)
    reference = [_grads(twin, IDS + r) for r in range(2)]
    for name, param in model.named_parameters():
        grad = full_grad(param)
        assert grad is not None
        assert grad.dtype == torch.float32
        mean = (reference[0][name].float() + reference[1][name].float()) / 2
        torch.testing.assert_close(grad, mean, rtol=1e-2 if dtype else 1e-5, atol=1e-2 if dtype else 1e-6)
    grads = {name: full_grad(param) for name, param in model.named_parameters()}
    optimizer.step()
    for name, param in model.named_parameters():
        grad, moment = grads[name], full_optimizer_state(optimizer, param, "exp_avg")
        assert grad is not None
        assert moment is not None
        torch.testing.assert_close(moment, 0.1 * grad)
        step = full_optimizer_state(optimizer, param, "step")
        assert step is not None
        assert float(step) == 1.0
        set_full_optimizer_state(optimizer, param, "step", torch.tensor(-3.0))
        assert float(full_optimizer_state(optimizer, param, "step") or 0) == -3.0
        master = full_tensor(param, master=True)
        assert master.dtype == torch.float32
        assert torch.equal(master.to(param.dtype), full_tensor(param))
    optimizer.zero_grad()
    assert full_grad(model.embed.weight) is None


def _grads(twin: Tail, ids: Tensor) -> dict[str, Tensor]:
    twin.zero_grad()
    twin(ids).square().mean().backward()
    return {name: param.grad.clone() for name, param in twin.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_weights_and_state_can_be_set_whole(stage: int) -> None:
    torch.manual_seed(0)
    model = Tail(functional=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    owner = Zero.model_validate({"stage": stage, "bucket_numel": 1, "dtype": "bfloat16"}).shard(model)
    ShardedOptimizer(optimizer, owner)
    weight = model.blocks[1].weight
    value = torch.linspace(-1, 1, 16).view(4, 4)
    set_full_tensor(weight, value)
    assert torch.equal(full_tensor(weight, master=True), value)  # not rounded to bf16
    assert torch.equal(full_tensor(weight), value.bfloat16())
    with pytest.raises(KeyError, match="has no state 'exp_avg'"):
        set_full_optimizer_state(optimizer, weight, "exp_avg", value)
    model(IDS).sum().backward()
    optimizer.step()
    set_full_optimizer_state(optimizer, weight, "exp_avg", value)
    found = full_optimizer_state(optimizer, weight, "exp_avg")
    assert found is not None
    assert torch.equal(found, value)
    with pytest.raises(ValueError, match=r"\(4, 4\), the new value \(2, 2\)"):
        set_full_tensor(weight, torch.ones(2, 2))


class Teacher(nn.Module):
    """A frozen copy that follows its student by in-place writes."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 4)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.student(x) - self.teacher(x)).square().sum()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(2)
def test_a_frozen_teacher_may_be_written(stage: int, dtype: str | None) -> None:
    torch.manual_seed(0)
    model = Teacher()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    ShardedOptimizer(optimizer, Zero.model_validate({"stage": stage, "dtype": dtype}).shard(model))
    x = torch.ones(1, 4, dtype=model.student.weight.dtype)
    for _ in range(2):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        student = full_tensor(model.student.weight)
        with gather(model.teacher, write=0) if stage == 3 else contextlib.nullcontext(), torch.no_grad():
            model.teacher.weight.lerp_(student, 0.5)
        expected = full_tensor(model.teacher.weight)
        model(x).backward()
        assert torch.equal(full_tensor(model.teacher.weight), expected)
        optimizer.zero_grad()
    if stage == 3:
        with pytest.raises(LostWriteError, match=r"teacher\.weight"), gather(model.teacher), torch.no_grad():
            model.teacher.weight.zero_()
