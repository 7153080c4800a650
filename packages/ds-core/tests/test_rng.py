"""RngState: the same draws after a resume at the same world size, and a fixed rule at another."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_core.state.checkpoint import CheckpointStore
from ds_core.testing.distributed import run_ranks
from ds_core.train.rng import RngState


def draw(own: torch.Generator) -> list[float]:
    return [
        float(torch.rand(1)),
        float(torch.rand(1, generator=own)),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
    ]


def save(rank: int, world: int, folder: str) -> list[float]:
    own = torch.Generator().manual_seed(50 + rank)
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    draw(own)
    CheckpointStore(folder).save(1, {"rng": RngState(generators={"own": own})})
    return draw(own)


def load(rank: int, world: int, folder: str) -> list[float]:
    own = torch.Generator()
    CheckpointStore(folder).load({"rng": RngState(generators={"own": own})}, verify=True)
    return draw(own)


def test_the_same_world_draws_the_same_numbers(tmp_path: Path):
    saved = run_ranks(save, 2, folder=str(tmp_path))
    assert run_ranks(load, 2, folder=str(tmp_path)) == saved


def test_another_world_draws_new_numbers_that_are_the_same_each_time(tmp_path: Path):
    saved = run_ranks(save, 2, folder=str(tmp_path))
    three = run_ranks(load, 3, folder=str(tmp_path))
    assert three == run_ranks(load, 3, folder=str(tmp_path))
    numbers = [number for row in [*saved, *three, load(0, 1, str(tmp_path))] for number in row]
    assert len(set(numbers)) == len(numbers)


def test_a_generator_the_checkpoint_lacks_is_seeded_by_the_rule(tmp_path: Path):
    CheckpointStore(tmp_path).save(1, {"rng": RngState()})
    drawn = [load(0, 1, str(tmp_path)) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_taken_names_and_foreign_parts_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\['numpy'\].*taken"):
        RngState(generators={"numpy": torch.Generator()})
    with pytest.raises(ValueError, match="not written by RngState"):
        RngState().load_targets({})
