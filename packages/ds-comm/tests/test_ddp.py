"""Codecs as DDP communication hooks: exact where they are, bounded where they are not, and with a memory."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ds_comm import CommLog, Int4, Int8, OneBit
from ds_comm.bridges.bucket_memory import BucketMemory, Piece
from ds_comm.bridges.ddp import CodedHook, coded_hook, reduce_remembering
from ds_core.ground.codec import CastCodec
from ds_core.ground.mesh import Topology
from ds_core.ground.wire import Codec
from ds_core.testing.distributed import distributed, run_ranks
from ds_core.testing.faults import slow_module

CPU = torch.device("cpu")
SMALL = 0.0002  # MB of a bucket: several buckets, and others after the first iteration


class Late(nn.Module):
    """Uses its parameters in another order than it declares them, so that DDP cuts its buckets anew."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.middle = nn.Linear(30, 5), nn.Linear(8, 40), nn.Linear(40, 30)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return out


def build(cap: float = 25.0, **options: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(Late(), bucket_cap_mb=cap, **options)


def batch(step: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def grads(ddp: DistributedDataParallel, step: int) -> dict[str, Tensor]:
    ddp.zero_grad()
    ddp(batch(step)).square().mean().backward()
    return {name: p.grad.clone() for name, p in ddp.module.named_parameters() if p.grad is not None}


def hooked(
    codec: Codec | None, cap: float = 25.0, **options: Any
) -> tuple[DistributedDataParallel, CodedHook]:
    ddp = build(cap)
    state = CodedHook(ddp, codec, **options)
    ddp.register_comm_hook(state, coded_hook)
    return ddp, state


@pytest.mark.parametrize("world", [1, 2])  # of three, ranks are added in another order than gloo's
def test_without_a_codec_it_is_ddp_bit_for_bit(world: int) -> None:
    run_ranks(plain_is_plain, world)


def plain_is_plain(rank: int, world: int) -> None:
    for cap in (SMALL, 25.0):
        plain, (ours, _) = build(cap), hooked(None, cap)
        for step in range(3):
            wanted, found = grads(plain, step), grads(ours, step)
            assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@distributed(2)
def test_a_cast_that_loses_nothing_is_exact(rank: int, world: int) -> None:
    plain, (ours, _) = build(SMALL), hooked(CastCodec(torch.float32), SMALL)
    for step in range(3):
        wanted, found = grads(plain, step), grads(ours, step)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@distributed(3)
def test_int8_is_within_its_bound_the_same_on_all_ranks_and_not_exact(rank: int, world: int) -> None:
    """One bucket, two roundings: each rank's gradient, and the mean of a chunk."""
    codec = Int8()
    plain, (ours, _) = build(), hooked(Int8())
    grads(plain, 0), grads(ours, 0)  # afterwards buckets have the order of use
    wanted, found = grads(plain, 1), grads(ours, 1)
    local = Late()
    local.load_state_dict(ours.module.state_dict())
    local(batch(1)).square().mean().backward()
    largest = torch.tensor([max(float(p.grad.abs().max()) for p in local.parameters() if p.grad is not None)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    sample = torch.full((codec.block,), float(largest))
    bound = 2 * float(codec.error_bound(sample.view(1, -1)).max()) * (1 + 1e-6)
    errors = {name: float((wanted[name] - found[name]).abs().max()) for name in wanted}
    assert 0 < max(errors.values()) <= bound
    for name, grad in found.items():
        first = grad.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, grad), name


@distributed(3)
def test_error_feedback_makes_the_mean_update_the_true_one(rank: int, world: int) -> None:
    """The same gradients over and over: what is owed stays bounded, so the average's error goes with
    1 / steps; without a memory it stays where it is."""
    comm = Topology().build().communicator("data")
    mine = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    wanted = mine.clone()
    dist.all_reduce(wanted.div_(world))
    pieces = [Piece("p", 0, torch.Size([1000]))]

    def errors(codec: Codec, feedback: bool) -> list[float]:
        """Of the average after 20 steps and after 160."""
        memory, total, found = BucketMemory(rank, world), torch.zeros(1000), []
        for step in range(1, 161):
            if not feedback:
                memory = BucketMemory(rank, world)
            total += reduce_remembering(comm, codec, mine, memory.of(pieces, 1000, CPU))
            if step in (20, 160):
                found.append(float((total / step - wanted).abs().max()))
        return found

    for codec in (Int4(), Int8()):
        early, late = errors(codec, True)
        assert late < early / 4, (codec, early, late)
        early, late = errors(codec, False)
        assert late > early / 1.01, (codec, early, late)


def owed(state: CodedHook) -> dict[str, Tensor]:
    """What the mean still owes, over all ranks: nothing of it may be lost when buckets change."""
    saved = state.state_dict()
    found = {}
    for name, worker in saved["worker"].items():
        found[name] = worker.double() / saved["world"] + saved["server"][name].double()
        dist.all_reduce(found[name])
    return found


@pytest.mark.parametrize("codec", ["Int8", "OneBit"])
def test_errors_survive_the_cut_into_new_buckets(codec: str) -> None:
    run_ranks(nothing_is_lost, 2, codec=codec)


def nothing_is_lost(rank: int, world: int, codec: str) -> None:
    """All that was sent and what is still owed add up to all gradients."""
    made = {"Int8": Int8, "OneBit": OneBit}[codec]()
    plain, (ours, state) = build(SMALL), hooked(made, SMALL, error_feedback=True)
    wanted = {name: torch.zeros_like(p).double() for name, p in ours.module.named_parameters()}
    sent = {name: torch.zeros_like(grad) for name, grad in wanted.items()}
    orders = []
    for step in range(4):
        for name, grad in grads(plain, step).items():
            wanted[name] += grad
        for name, grad in grads(ours, step).items():
            sent[name] += grad
        assert state._memory is not None
        orders.append(sorted(tuple(p.name for p in bucket) for bucket in state._memory._buckets))
        left = owed(state)
        for name in wanted:
            torch.testing.assert_close(sent[name] + left[name], wanted[name], atol=2e-6, rtol=1e-5)
    assert orders[0] != orders[1] == orders[3]  # the buckets did change, once


@distributed(2)
def test_state_goes_on_where_it_stopped(rank: int, world: int) -> None:
    """Buckets as DDP cuts them at first, which it does again after a restart: bit for bit."""
    options = {"find_unused_parameters": True}  # DDP then keeps the buckets
    first = build(25.0, **options)
    state = CodedHook(first, Int8(), error_feedback=True)
    first.register_comm_hook(state, coded_hook)
    for step in range(3):
        grads(first, step)
    saved = state.state_dict()
    assert any(float(error.abs().max()) > 0 for error in saved["worker"].values())
    again = build(25.0, **options)
    other = CodedHook(again, Int8(), error_feedback=True)
    again.register_comm_hook(other, coded_hook)
    other.load_state_dict(saved)
    restarted = [grads(again, step) for step in (3, 4)]
    went_on = [grads(first, step) for step in (3, 4)]
    for one, two in zip(restarted, went_on, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@distributed(2)
def test_states_that_do_not_belong_are_refused(rank: int, world: int) -> None:
    ddp, state = hooked(Int8(), error_feedback=True)
    grads(ddp, 0)
    saved = state.state_dict()
    with pytest.raises(ValueError, match="format None; allowed: 1"):
        state.load_state_dict({})
    with pytest.raises(ValueError, match="state is of 4 ranks, there are 2"):
        state.load_state_dict({**saved, "world": 4})
    wrong = {**saved["worker"], "last.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"'last.bias' of shape \[7\], the model has shape \[5\]"):
        state.load_state_dict({**saved, "worker": wrong})
    _, forgetful = hooked(Int8())
    with pytest.raises(ValueError, match="error_feedback=True"):
        forgetful.load_state_dict(saved)


@distributed(2)
def test_a_gradient_that_is_not_finite_raises_on_every_rank_and_names_the_parameter(
    rank: int, world: int
) -> None:
    for value in (float("nan"), float("inf")):
        for options in ({}, {"error_feedback": True}):
            ddp, _ = hooked(Int8(), SMALL, **options)
            grads(ddp, 0)
            middle = ddp.module.middle.bias
            handle = middle.register_hook(lambda grad, v=value: grad * (v if rank == 1 else 1.0))
            with pytest.raises(RuntimeError, match=r"gradient of middle\.bias is not finite on rank 1"):
                grads(ddp, 1)
            handle.remove()


@distributed(2)
def test_ranks_that_disagree_are_told_before_anything_is_sent(rank: int, world: int) -> None:
    ddp = build()
    with pytest.raises(
        ValueError, match=r"disagree on the communication hook: block is 256 on rank 0; 64 on rank 1"
    ):
        CodedHook(ddp, Int8(block=256 if rank == 0 else 64))
    with pytest.raises(ValueError, match="codec is"):
        CodedHook(ddp, Int8() if rank == 0 else CastCodec(torch.bfloat16))
    alone = [dist.new_group([one]) for one in range(2)]  # noqa: TID251 - what a user may have
    inner = DistributedDataParallel(Late(), process_group=alone[rank])
    with pytest.raises(ValueError, match=rf"DDP reduces over ranks \[{rank}\], axis 'data' of the mesh has"):
        CodedHook(inner, Int8())


@distributed(2)
def test_the_wire_carries_a_quarter_and_the_log_hears_of_it(rank: int, world: int) -> None:
    mesh = Topology().build()
    ddp, _ = hooked(Int8(), mesh=mesh)
    with CommLog(mesh) as log:
        grads(ddp, 0)
    rows = {row.op: row for row in log.summary().rows if row.codec}
    assert set(rows) == {"all_to_all", "all_gather"}
    numel = sum(p.numel() for p in ddp.parameters())
    for row in rows.values():
        assert row.codec == "Int8"
        assert row.logical_bytes == pytest.approx(4 * numel, abs=8)
        assert row.wire_bytes < 0.3 * row.logical_bytes


@distributed(2)
def test_the_backward_goes_on_while_buckets_travel(rank: int, world: int) -> None:
    """A slow wire of 60 ms a bucket under a backward of 3 x 60 ms: together far below one after the other."""
    ddp, state = hooked(CastCodec(torch.bfloat16), SMALL)
    grads(ddp, 0)
    reduce, threads = state._reduce, set()

    def slowly(buffer: Tensor, pieces: list[Piece]) -> None:
        import threading

        threads.add(threading.current_thread().name)
        time.sleep(0.06)
        reduce(buffer, pieces)

    state._reduce = slowly  # type: ignore[method-assign]
    buckets = 0
    for module in (ddp.module.last, ddp.module.middle, ddp.module.first):
        module.register_full_backward_hook(lambda *_: time.sleep(0.06))
        buckets += 1
    begin = time.perf_counter()
    grads(ddp, 1)
    assert time.perf_counter() - begin < 0.06 * (2 * buckets)
    assert threads == {"ds-ddp-hook"}
    with slow_module(ddp.module.first, 20.0 if rank else 0.0):  # a late rank changes nothing
        late = grads(ddp, 2)
    plain, (prompt, _) = build(SMALL), hooked(CastCodec(torch.bfloat16), SMALL)
    grads(plain, 0), grads(prompt, 0), grads(prompt, 1)
    assert all(torch.equal(late[name], grad) for name, grad in grads(prompt, 2).items())


def test_a_memory_cut_anew_owes_the_same() -> None:
    """Rank 1 of 2: its chunk of the mean owes 2 and 3; in the new order these are rank 0's to sum."""
    memory = BucketMemory(1, 2)
    a, b = Piece("a", 0, torch.Size([2])), Piece("b", 2, torch.Size([1, 2]))
    errors = memory.of([a, b], 4, CPU)
    errors.worker.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    errors.server.copy_(torch.tensor([2.0, 3.0]))
    again = memory.of(
        [Piece("b", 0, torch.Size([1, 2])), Piece("a", 2, torch.Size([2]))], 4, torch.device("cpu")
    )
    assert again.worker.tolist() == [3.0 + 2 * 2.0, 4.0 + 2 * 3.0, 1.0, 2.0]
    assert again.server.tolist() == [0.0, 0.0]
