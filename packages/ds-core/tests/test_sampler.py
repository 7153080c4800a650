"""One global order, shared out to ranks, resumed at other world sizes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from ds_core.state.shard import Saveable, SavedTensor
from ds_core.train.sampler import ResumableLoader, ResumableSampler, epoch_order


def step_sets(samplers: list[ResumableSampler], steps: int) -> list[list[int]]:
    """What all ranks together use in each of the next optimizer steps, in order."""
    found = []
    for _ in range(steps):
        if not len(samplers[0]):
            break
        used: list[int] = []
        for _ in range(samplers[0].accumulate):
            for sampler in samplers:
                used += next(iter(sampler))
            for sampler in samplers:
                sampler.advance()
        found.append(used)
    return found


def ranks(world: int, micro: int, accumulate: int = 1, **options: object) -> list[ResumableSampler]:
    return [
        ResumableSampler(100, micro, rank=rank, world=world, accumulate=accumulate, **options)  # type: ignore[arg-type]
        for rank in range(world)
    ]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(50, 3, 4), epoch_order(50, 3, 4))
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert sorted(epoch_order(50, 0, 0).tolist()) == list(range(50))
    assert epoch_order(4, 0, 0, shuffle=False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("world", "micro", "accumulate"), [(1, 12, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3)])
def test_steps_do_not_depend_on_who_shares_them(world: int, micro: int, accumulate: int) -> None:
    order = epoch_order(100, 7, 0).tolist()
    want = [order[at : at + 12] for at in range(0, 96, 12)]
    assert step_sets(ranks(world, micro, accumulate, seed=7), 8) == want


@pytest.mark.parametrize("after", [1, 5, 8, 11])
def test_resume_at_another_world_size(after: int) -> None:
    straight = step_sets(ranks(2, 3, 2, seed=7), 20)
    first = ranks(2, 3, 2, seed=7)
    begun = step_sets(first, after)
    saved = json.loads(json.dumps(first[0].state_dict()))
    second = ranks(4, 3, 1)
    for sampler in second:
        sampler.load_state_dict(saved)
    assert begun + step_sets(second, 20 - after) == straight
    assert second[0].epoch == 2


def test_partial_steps_are_handed_out_again() -> None:
    sampler = ResumableSampler(20, 2, accumulate=2)
    batches = list(sampler)
    sampler.advance(3)
    again = ResumableSampler(20, 2, accumulate=2)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == batches[2:]
    assert list(sampler) == batches[3:]


def test_tail() -> None:
    drop, pad = ResumableSampler(10, 4, tail="drop"), ResumableSampler(10, 4, tail="pad")
    assert (len(drop), len(pad)) == (2, 3)
    order = epoch_order(10, 0, 0).tolist()
    assert list(pad)[-1] == order[8:] + order[:2]
    drop.advance(2)
    pad.advance(3)
    assert (drop.epoch, drop.consumed) == (pad.epoch, pad.consumed) == (1, 0)


def test_a_remainder_too_small_for_the_new_world_turns_the_epoch() -> None:
    small = ResumableSampler(10, 2)
    small.advance(4)
    large = ResumableSampler(10, 4)
    large.load_state_dict(small.state_dict())
    assert (large.epoch, large.consumed) == (1, 0)


def test_loader_notes_what_was_used_not_what_was_read_ahead() -> None:
    data = TensorDataset(torch.arange(12))
    loader = ResumableLoader(data, ResumableSampler(12, 2, seed=1), num_workers=1)
    assert isinstance(loader, Saveable)
    first = []
    for (batch,) in loader:
        first.append(batch.tolist())
        if len(first) == 2:
            break
    assert loader.state_dict()["consumed"] == 4
    rest = [batch.tolist() for (batch,) in loader]
    assert [x for batch in first + rest for x in batch] == epoch_order(12, 1, 0).tolist()
    assert loader.state_dict()["epoch"] == 1
    assert [x for (batch,) in loader for x in batch.tolist()] == epoch_order(12, 1, 1).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"length": 3, "micro_batch": 2, "world": 2, "rank": 1},
            "3 samples do not fill one global batch",
        ),
        ({"length": 3, "micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
        ({"length": 3, "micro_batch": 1, "rank": 1}, "allowed: 0 to 0"),
        ({"length": 3, "micro_batch": 1, "tail": "keep"}, 'allowed: "drop"'),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableSampler(**options)  # type: ignore[arg-type]


def test_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="over 10 samples, this one is over 12"):
        ResumableSampler(12, 2).load_state_dict(ResumableSampler(10, 2).state_dict())
    with pytest.raises(ValueError, match="keeps no tensors"):
        ResumableSampler(12, 2).load_targets({"x": SavedTensor(torch.Size([1]), torch.float32)})
