"""Training with state on host and disk equals training without to the bit: tiers, stages, dtypes, models."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_core.ground.mesh import Mesh, Topology
from ds_core.testing.distributed import run_ranks
from ds_offload import TieredStore

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parity")]

STEPS = 2


Row = tuple[str, int, str, int, int, str, str, float | None]


def rows() -> list[Row]:
    """(case, stage, policy, depth, accumulate, dtype, optimizer, max_norm), every two of them together."""
    from pair import ALL_CASES, DTYPES, OPTIMIZERS, POLICIES, pairwise

    columns = [
        list(ALL_CASES), (0, 1, 2, 3), list(POLICIES), (1, 2, 3), (1, 4), list(DTYPES), list(OPTIMIZERS),
        (None, 0.1),
    ]  # fmt: skip
    fp64 = ("mixed_dtypes", "fused")  # which FusedAdamW refuses
    return [row for row in pairwise(columns) if (row[0], row[6]) != fp64]


def run_row(mesh: Mesh, row: Row, folder: Path) -> None:
    from pair import ALL_CASES, CHUNK, DTYPES, OPTIMIZERS, POLICIES, hold_equal, start

    case, stage, policy, depth, accumulate, dtype, optimizer, max_norm = row
    store = TieredStore(nvme=str(folder), chunk_numel=CHUNK, depth=depth, **POLICIES[policy])
    more = {"bucket_numel": 1000} if case == "unused_on_one_rank" else {}  # which ranks use together
    make = OPTIMIZERS[optimizer]
    both = [
        start(ALL_CASES[case], stage, mesh, make=make, dtype=DTYPES[dtype], store=each, **more)
        for each in (None, store)
    ]
    try:
        for step in range(STEPS):
            losses = [run.backward(step, accumulate) for run in both]
            for run in both:
                run.sharded.show_grads()
            hold_equal(*both, f"gradients of step {step}")
            norms = [run.finish(max_norm) for run in both]
            hold_equal(*both, f"after step {step}")
            assert losses[0] == losses[1], losses
            assert norms[0] == norms[1], norms
        away = sum(store.bytes_by_tier().values()) > store.bytes_by_tier()["device"]
        assert policy == "mixed" or away  # a small model may be less than the shares on the device
    finally:
        for run in both:
            run.close()


def every_row(folder: Path) -> int:
    mesh, faults = Topology(dp_shard=dist.get_world_size()).build(), []
    for row in rows():
        try:
            run_row(mesh, row, folder)
        except Exception as fault:
            faults.append(f"{row}: {type(fault).__name__}: {fault}")
            if dist.get_world_size() > 1:  # the others may be elsewhere by now
                break
    assert not faults, "\n".join([f"{len(faults)} of {len(rows())} rows", *faults])
    return len(rows())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_with_state_elsewhere_is_equal_to_the_bit(world: int, tmp_path: Path) -> None:
    assert run_ranks(every_row, world, timeout=200.0, folder=tmp_path) == [len(rows())] * world


def against_the_twin(case: str, folder: Path) -> None:
    from matrix import run_cell
    from pair import POLICIES

    mesh = Topology(dp_shard=dist.get_world_size()).build()
    for stage, dtype, variant in product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), ("plain", "ema")):
        store = TieredStore(nvme=str(folder), **POLICIES["nvme"])
        run_cell(mesh, case, stage, 4, dtype, variant, store=store)
        store.close()


@pytest.mark.parametrize("case", ["tied", "frozen"])
def test_training_with_state_on_disk_equals_the_unsharded_twin(case: str, tmp_path: Path) -> None:
    run_ranks(against_the_twin, 2, timeout=120.0, case=case, folder=tmp_path)
