"""The plain update, on which the overlap modes are built: equal to no offload at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from overlap_cases import OPTIMIZERS, Run, assert_same


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_chunks_equal_one_step(optimizer: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    one, tier = Run(optimizer, dtype), "0.5 host / 0.5 nvme"
    two = Run(optimizer, dtype, nvme=str(tmp_path), masters=tier, moments=tier, grads=tier, chunk_numel=4096)
    for seed in range(4):
        one.step(seed, micro=2)
        two.step(seed, micro=2)
    assert_same(one.values(), two.values())
