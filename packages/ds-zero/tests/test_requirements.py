"""What plug-ins for training libraries learned the hard way that an engine must do: one test for each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_core import ReplicatedOwner, ShardedOptimizer
from ds_core.testing.distributed import distributed
from ds_core.testing.parity import assert_close_norm
from ds_zero import Zero, clip_grad_norm_, full_tensor, shard

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


class Net(nn.Module):
    """Frozen and trained weights in checkpointed blocks, a tied head, an fp32 buffer."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8) / 8))
        for block in self.blocks:
            block.bias.requires_grad_(True)
            block.weight.requires_grad_(not frozen)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x * self.inv_freq.to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False).tanh()
        return self.head(x).float().square().mean()


def ids(seed: int, rank: int) -> Tensor:
    return torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(10 * seed + rank))


def built(
    stage: int, *, frozen: bool = False, dtype: torch.dtype | None = None
) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Net(frozen=frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shard(model, optimizer, stage=stage, dtype=dtype)
    return model, optimizer


def twin(steps: int, micro: int = 1, *, frozen: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net(frozen=frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        for number in range(micro):
            for rank in range(2):
                (model(ids(step * micro + number, rank)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def equal_twin(model: Net, expected: dict[str, Tensor]) -> None:
    # AdamW divides by sqrt(v): rounding differences of gradients near zero come back at the size of lr.
    assert_close_norm({name: full_tensor(param) for name, param in model.named_parameters()}, expected, 1e-5)


@STAGES
@distributed(world_size=2)
def test_1_shards_are_swapped_into_the_users_own_groups(stage: int) -> None:
    torch.manual_seed(0)
    model = Net()
    groups = [{"params": [model.embed.weight], "lr": 0.5, "mine": "a"}, {"params": model.blocks.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = optimizer.param_groups
    assert shard(model, optimizer, stage=stage)[1] is optimizer
    assert optimizer.param_groups is before
    assert [group["lr"] for group in before] == [0.5, 0.1]
    assert before[0]["mine"] == "a"


@STAGES
@distributed(world_size=2)
def test_3_frozen_weights_stay_for_a_checkpoint_that_is_not_reentrant(stage: int, rank: int) -> None:
    model, optimizer = built(stage, frozen=True)
    for step in range(3):
        model(ids(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    equal_twin(model, twin(3, frozen=True))


@STAGES
@distributed(world_size=2)
def test_4_micro_steps_are_counted_where_no_boundary_is_set(stage: int, rank: int) -> None:
    model, optimizer = built(stage)
    for step in range(2):
        for number in range(3):
            model(ids(3 * step + number, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    equal_twin(model, twin(2, micro=3))


@pytest.mark.parametrize("clips", [False, True])
@STAGES
@distributed(world_size=2)
def test_5_a_closure_runs_with_gradients(stage: int, clips: bool, rank: int) -> None:
    model, optimizer = built(stage)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(ids(0, rank))
        loss.backward()
        if clips:
            clip_grad_norm_(optimizer, 1e9)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad
    equal_twin(model, twin(1))


@STAGES
@distributed(world_size=2)
def test_7_the_state_dict_of_the_users_optimizer_goes_round(stage: int, rank: int) -> None:
    model, optimizer = built(stage)
    model(ids(0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = optimizer.state_dict()
    held = sum(v.nbytes for state in saved["state"].values() for v in state.values() if v.dim())
    whole = sum(8 * param.numel() for param in model.parameters())
    assert held <= (whole if stage == 0 else whole / 2 + 8 * 8 * 4)  # half, and padding
    optimizer.load_state_dict(saved)
    model(ids(1, rank)).backward()
    optimizer.step()
    equal_twin(model, twin(2))


@STAGES
@distributed(world_size=2)
def test_8_parameters_are_cast_buffers_are_not_and_tied_ones_stay_tied(stage: int) -> None:
    model, _ = built(stage, dtype=torch.bfloat16)
    assert model.inv_freq.dtype is torch.float32
    assert model.embed.weight.dtype is torch.bfloat16
    assert model.head.weight is model.embed.weight
    state = model.state_dict()
    assert torch.equal(state["head.weight"], state["embed.weight"])


@STAGES
@distributed(world_size=2)
def test_9_saving_the_model_is_a_call_of_all_ranks(stage: int) -> None:
    model, _ = built(stage)
    state = model.state_dict()  # all ranks; only the writing is rank 0's
    torch.manual_seed(0)
    plain = Net()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())


@STAGES
@distributed(world_size=2)
def test_11_ranks_need_no_common_seed(stage: int, rank: int) -> None:
    torch.manual_seed(rank)
    model = Net()
    model.inv_freq += rank
    if stage == 0:
        ReplicatedOwner(model)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ShardedOptimizer(optimizer, Zero(stage=stage).shard(model))
    torch.manual_seed(0)
    first = Net()
    for name, param in model.named_parameters():
        assert torch.equal(full_tensor(param), first.get_parameter(name))
    mine = model.inv_freq.clone()
    dist.broadcast(mine, 0)
    assert torch.equal(mine, model.inv_freq)
