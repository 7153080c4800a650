"""Codecs under torch's FSDP2 on real ranks: exact without rounding, within the bound with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ds_comm import CommLog, Int8, NotFiniteError
from ds_comm.bridges.fsdp2 import CodedAllGather, Wires, use_codecs
from ds_core.ground.codec import CastCodec
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import distributed

FP32, BF16 = CastCodec(torch.float32), CastCodec(torch.bfloat16)


def build(dtype: torch.dtype | None = None, **codecs: Any) -> nn.Module:
    """A model in three units, one of them of odd sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 6), nn.Tanh(), nn.Linear(6, 3))
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for index in (0, 2):
        fully_shard(model[index], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if codecs:
        assert use_codecs(model, **codecs) == 3
    return model


def batch(step: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def train(model: nn.Module, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


@distributed(2)
def test_what_rounds_nothing_is_plain_fsdp2_bit_for_bit(rank: int, world: int) -> None:
    wanted = train(build(), 3)
    for codecs in ({"gather": FP32}, {"reduce": FP32}, {"gather": FP32, "reduce": FP32}):
        found = train(build(**codecs), 3)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), codecs


@distributed(3)
def test_a_gather_alone_leaves_reductions_as_they_are(rank: int, world: int) -> None:
    wanted, found = train(build(), 3), train(build(gather=FP32), 3)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@distributed(3)
def test_mixed_precision_and_backward_prefetch(rank: int, world: int) -> None:
    """bf16 over a bf16 wire loses nothing more, whoever asks for the weights first."""
    wanted = train(build(torch.bfloat16), 2)
    model = build(torch.bfloat16, gather=BF16)
    model[2].set_modules_to_forward_prefetch([model[0]])
    model[0].unshard(async_op=True)
    found = train(model, 2)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@distributed(2)
def test_int8_weights_are_within_the_bound_and_not_equal(rank: int, world: int) -> None:
    codec = Int8()
    plain, ours = build(), build(gather=Int8())
    for unit in ("0", "2"):
        exact, rounded = (dict(model.named_modules())[unit] for model in (plain, ours))
        exact.unshard(), rounded.unshard()
        largest = max(float(p.abs().max()) for p in exact.parameters())
        bound = float(codec.error_bound(torch.full((1, codec.block), largest)).max()) * (1 + 1e-6)
        pairs = list(zip(exact.parameters(), rounded.parameters(), strict=True))
        error = max(float((one - other).abs().max()) for one, other in pairs)
        assert 0 < error <= bound
        for _, other in pairs:
            first = other.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, other)


@distributed(3)
def test_int8_gradients_are_within_the_bound_and_not_equal(rank: int, world: int) -> None:
    plain, ours = build(), build(reduce=Int8())
    for model in (plain, ours):
        model(batch(0)).square().mean().backward()
    local = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 6), nn.Tanh(), nn.Linear(6, 3))
    local.load_state_dict({name: p.full_tensor().detach() for name, p in plain.named_parameters()})
    local(batch(0)).square().mean().backward()
    largest = torch.tensor([max(float(p.grad.abs().max()) for p in local.parameters() if p.grad is not None)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    bound = float(Int8().error_bound(torch.full((1, 256), float(largest))).max()) * (1 + 1e-6)
    errors = [
        float((one.grad.full_tensor() - other.grad.full_tensor()).abs().max())
        for one, other in zip(plain.parameters(), ours.parameters(), strict=True)
        if one.grad is not None and other.grad is not None
    ]
    assert len(errors) == 6
    assert 0 < max(errors) <= bound


@distributed(2)
def test_gradients_that_are_not_finite_raise_on_every_rank_and_name_the_unit(rank: int, world: int) -> None:
    for value in (float("nan"), float("inf")):
        loss = build(reduce=Int8())(batch(0)).square().mean() * (value if rank == 1 else 1.0)
        with pytest.raises(NotFiniteError, match="a gradient of 2 is not finite on rank 1 of its group"):
            loss.backward()


@distributed(2)
def test_what_cannot_be_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="no codec given"):
        use_codecs(build())
    with pytest.raises(ValueError, match="no module of this model went through fully_shard"):
        use_codecs(nn.Linear(2, 2), gather=FP32)
    model = build()
    with pytest.raises(ValueError, match="ranks disagree on the codecs of FSDP2: reduce dtype is"):
        use_codecs(model, reduce=FP32 if rank == 0 else BF16)
    model = build(reduce=Int8())
    for unit in (model[0], model[2], model):
        unit.set_gradient_divide_factor(3.0)
    with pytest.raises(ValueError, match="set_force_sum_reduction_for_comms"):
        model(batch(0)).square().mean().backward()
    packed = torch.zeros(8, dtype=torch.uint8)
    gather = CodedAllGather(Int8(), Wires(Topology().build().log), about="0")
    with pytest.raises(ValueError, match=r"the weights of 0 travel as torch\.uint8, packed by FSDP2"):
        gather(packed, packed[:4], dist.distributed_c10d._get_default_group())


@distributed(2)
def test_a_divide_factor_with_plain_sums(rank: int, world: int) -> None:
    found = []
    for codecs in ({}, {"reduce": FP32}):
        model = build(**codecs)
        for unit in (model[0], model[2], model):
            unit.set_gradient_divide_factor(3.0)
            unit.set_force_sum_reduction_for_comms(True)
        found.append(train(model, 2))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@distributed(2)
def test_the_log_hears_of_it(rank: int, world: int) -> None:
    mesh = Topology().build()
    model = build(gather=Int8(), reduce=Int8(), mesh=mesh)
    with CommLog(mesh) as log:
        train(model, 1)
    rows = {row.op: row for row in log.summary().rows if row.codec == "Int8"}
    assert set(rows) == {"all_gather", "all_to_all"}
    assert {row.axis for row in rows.values()} == {"fsdp"}
    assert rows["all_to_all"].calls == 3


@distributed(2)
def test_modules_that_are_cut_together_are_one_unit(rank: int, world: int) -> None:
    found = []
    for codecs in ({}, {"gather": FP32, "reduce": FP32}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 33), nn.Linear(33, 6), nn.Linear(6, 3))
        mesh = DeviceMesh("cpu", [0, 1])
        fully_shard([model[0], model[1]], mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert not codecs or use_codecs(model, **codecs) == 2
        found.append(train(model, 2))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
