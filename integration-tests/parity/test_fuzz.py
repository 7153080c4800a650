"""500 random models with random control flow train as their unsharded twins do, at every stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
MODELS, PER_CALL = 500, 50


def train(first: int, stage: int) -> None:
    from fuzz import run_seed

    mesh = Topology().build()  # its process groups serve all models
    for seed in range(first, first + PER_CALL):
        try:
            run_seed(mesh, seed, stage)
        except Exception as fault:
            raise AssertionError(f"seed {seed}, stage {stage}: {type(fault).__name__}: {fault}") from fault


@pytest.mark.parametrize("first", range(0, MODELS, PER_CALL))
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_random_models_equal_their_twins(first: int, stage: int) -> None:
    run_ranks(train, 2, timeout=120.0, first=first, stage=stage)
