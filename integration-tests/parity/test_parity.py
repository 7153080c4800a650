"""The parity matrix: stages x accumulation x dtype x world x every corner model, against the twin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import run_ranks
from ds_core.testing.models import CASES

sys.path.insert(0, str(Path(__file__).parent))


def cells(case: str, variant: str = "plain", nodes: int = 1) -> None:
    from matrix import run_cell

    # Its process groups serve all cells.
    mesh = Topology(dp_replicate=nodes, dp_shard=dist.get_world_size() // nodes).build()
    for stage in (0, 1, 2, 3):
        for accumulate in (1, 4):
            for dtype in ("fp32", "bf16", "fp16"):
                try:
                    run_cell(mesh, case, stage, accumulate, dtype, variant)
                except AssertionError as fault:
                    cell = f"stage {stage}, accumulate {accumulate}, {dtype}"
                    raise AssertionError(f"{cell}: {fault}") from fault


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("case", list(CASES))
def test_sharded_training_equals_its_twin(case: str, world: int) -> None:
    run_ranks(cells, world, timeout=120.0, case=case)


@pytest.mark.parametrize("case", ["tied", "frozen"])
def test_copies_that_nothing_cuts_equal_the_twin(case: str) -> None:
    run_ranks(cells, 2, timeout=120.0, case=case, nodes=2)


@pytest.mark.parametrize("case", ["tied", "frozen", "unused_on_one_rank", "mixed_dtypes"])
def test_shards_inside_nodes_and_copies_across_equal_the_twin(case: str) -> None:
    """Two nodes of two ranks: HSDP, and MiCS, whose gradients cross nodes once in a step."""
    run_ranks(cells, 4, timeout=120.0, case=case, nodes=2)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("variant", "case"), [("muon", "tied"), ("ema", "frozen")])
def test_what_goes_on_top_of_sharding_equals_its_twin(variant: str, case: str, world: int) -> None:
    """`test_compile.py` has the row of compiled blocks."""
    run_ranks(cells, world, timeout=120.0, case=case, variant=variant)
