"""500 random models with random control flow train as their unsharded twins do, at every stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
MODELS, PER_CALL = 500, 25
STAGES = (1, 2, 3)


def train(first: int) -> None:
    from fuzz import expected, run_seed

    mesh = Topology().build()  # its process groups serve all models
    for seed in range(first, first + PER_CALL):
        history = expected(seed, mesh.world)
        for stage in STAGES:
            try:
                run_seed(mesh, seed, stage, history)
            except Exception as fault:
                raise AssertionError(
                    f"seed {seed}, stage {stage}: {type(fault).__name__}: {fault}"
                ) from fault


@pytest.mark.parametrize("first", range(0, MODELS, PER_CALL))
def test_random_models_equal_their_twins(first: int) -> None:
    run_ranks(train, 2, timeout=120.0, first=first)
