"""Errors of each rank: a row comes back bit for bit at its own world, and as the mean of all at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_comm import ErrorRows
from ds_core import CheckpointStore, ReplicatedOwner
from ds_core.state.owner import FlatOwner
from ds_core.testing.distributed import distributed, run_ranks

SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (7, 5), "1.bias": (7,)}


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))


def connected(owner: FlatOwner, name: str = "error") -> ErrorRows:
    errors = ErrorRows(name)
    errors.connect(owner.trainable, owner.everyone, owner.changes)
    return errors


def row(fqn: str, rank: int) -> Tensor:
    """The errors of a parameter on a rank, with fractions that fp32 has to round when it sums them."""
    generator = torch.Generator().manual_seed(100 * rank + sum(fqn.encode()))
    return torch.randn(SHAPES[fqn], generator=generator)


def fill(owner: FlatOwner, errors: ErrorRows, rank: int) -> None:
    for unit in owner.trainable:
        error = errors.of(unit).fill_(7.0)
        for slot in unit.layout.slots:
            error[slot.start : slot.end].copy_(row(slot.fqn, rank).view(-1))
        errors.clean(unit)


def found(owner: FlatOwner, errors: ErrorRows) -> dict[str, Tensor]:
    return {
        slot.fqn: errors.of(unit)[slot.start : slot.end].view(slot.shape).clone()
        for unit in owner.trainable
        for slot in unit.layout.slots
    }


def save(folder: Path) -> None:
    owner = ReplicatedOwner(build(), bucket_numel=1)
    errors = connected(owner)
    fill(owner, errors, dist.get_rank())
    CheckpointStore(folder).save(1, {"errors": errors})


def load(folder: Path, saved_world: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    owner = ReplicatedOwner(build(), bucket_numel=100)  # one unit now
    errors = connected(owner)
    CheckpointStore(folder).load({"errors": errors}, 1)
    for fqn, value in found(owner, errors).items():
        if world == saved_world:
            assert torch.equal(value, row(fqn, rank)), fqn
            continue
        total = torch.zeros(SHAPES[fqn])
        for old in range(saved_world):
            total += row(fqn, old)
        assert torch.equal(value, total / saved_world), fqn
    for unit in owner.trainable:
        assert errors.of(unit).count_nonzero() == sum(slot.numel for slot in unit.layout.slots)


@pytest.mark.parametrize("worlds", [(2, 2), (3, 3), (2, 1), (1, 2), (2, 3), (3, 2), (4, 3)])
def test_rows_come_back_or_their_mean(tmp_path: Path, worlds: tuple[int, int]) -> None:
    before, after = worlds
    run_ranks(save, before, folder=tmp_path)
    run_ranks(load, after, folder=tmp_path, saved_world=before)


def test_units_cut_anew_keep_their_parameters_errors() -> None:
    owner = ReplicatedOwner(build(), bucket_numel=1)
    errors = connected(owner)
    fill(owner, errors, 0)
    other = ReplicatedOwner(build(), bucket_numel=1000)
    assert len(other.trainable) == 1 < len(owner.trainable)
    errors.connect(other.trainable, other.everyone, other.changes)
    for fqn, value in found(other, errors).items():
        assert torch.equal(value, row(fqn, 0))


def test_who_still_reads_is_waited_for() -> None:
    owner = ReplicatedOwner(build())
    errors = connected(owner)
    asked: list[str] = []
    owner.before_next_change(lambda: asked.append("before"))
    errors.state_dict()
    assert not asked
    errors.of(owner.trainable[0])
    assert asked == ["before"]


def test_errors_without_an_owner_are_refused() -> None:
    owner = ReplicatedOwner(build())
    with pytest.raises(RuntimeError, match="connect them to an owner"):
        ErrorRows().of(owner.trainable[0])


@distributed(world_size=2)
def test_a_checkpoint_of_another_model_or_without_errors(tmp_path: Path) -> None:
    save(tmp_path)
    torch.manual_seed(3)
    owner = ReplicatedOwner(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 8)))
    errors = connected(owner)
    with pytest.raises(ValueError, match=r"1\.weight: in the model \(8, 5\), in the checkpoint \(7, 5\)"):
        CheckpointStore(tmp_path).load({"errors": errors}, 1)
    assert errors.load_targets({}) == {}
