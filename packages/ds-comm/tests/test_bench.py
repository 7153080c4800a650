"""`ds comm bench`: what it plans, what it measures on real ranks, and what it says to bad flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_comm.bench import CODED_OPS, Case, CaseTimes, plan_cases, run_cases
from ds_core.cli.main import main
from ds_core.ground.mesh import Topology
from ds_core.testing.distributed import run_ranks


def test_every_combination_that_there_is_and_no_other() -> None:
    cases = plan_cases(["all_gather", "broadcast"], [1024], ["fp32", "bf16"], ["none", "bf16", "int8"])
    assert {(case.op, case.dtype, case.codec) for case in cases} == {
        *(("all_gather", "fp32", codec) for codec in ("none", "bf16", "int8")),
        *(("all_gather", "bf16", codec) for codec in ("none", "int8")),
        *(("broadcast", dtype, "none") for dtype in ("fp32", "bf16")),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["gather"], [1], ["fp32"], ["none"]), "no op 'gather'; allowed: all_gather, reduce_scatter"),
        ((["all_gather"], [0], ["fp32"], ["none"]), "a size of 0 bytes"),
        ((["all_gather"], [1], ["int8"], ["none"]), "no dtype 'int8'; allowed: fp32, bf16, fp16"),
        ((["all_gather"], [1], ["fp32"], ["zip"]), "no codec 'zip'; allowed: none, bf16, fp16"),
        ((["broadcast"], [1], ["fp32"], ["bf16"]), "nothing to measure: codecs are for all_gather"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[list[str], ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_cases(*arguments)  # type: ignore[arg-type]


def test_bandwidths_by_hand() -> None:
    """6 MB in 3 ms between 3 ranks: 2 GB/s; every link of the all-reduce carries 4/3 of it."""
    one = CaseTimes(Case("all_reduce", "fp32", "none", 6_000_000), 3, 5, 8_000_000, 3.0, 2.0)
    assert one.algbw == pytest.approx(2e9)
    assert one.busbw == pytest.approx(2e9 * 4 / 3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_of_it_on_real_ranks(world: int) -> None:
    run_ranks(measure, world)


def measure(rank: int, world: int) -> None:
    mesh = Topology().build()
    ops = [*CODED_OPS, "all_to_all", "broadcast"]
    cases = plan_cases(ops, [40_000], ["fp32"], ["none", "bf16", "int8"])
    results = run_cases(mesh, cases, seconds=0.2)
    found = {(one.case.op, one.case.codec): one for one in results}
    assert len(found) == 3 * 3 + 2
    for one in results:
        assert one.world == world
        assert 0 < one.best_ms <= one.median_ms
        assert (one.busbw > 0) == (world > 1)
    if world == 1:
        return
    share = (world - 1) / world
    for op in ("all_gather", "reduce_scatter", "all_to_all"):
        assert found[op, "none"].sent_bytes == pytest.approx(40_000 * share, rel=1e-3)
    for op in CODED_OPS:
        assert found[op, "bf16"].sent_bytes == pytest.approx(found[op, "none"].sent_bytes / 2, rel=1e-2)
        assert found[op, "int8"].sent_bytes < 0.27 * found[op, "none"].sent_bytes
    told = torch.tensor([one.median_ms for one in results], dtype=torch.float64)
    other = told.clone()
    mesh.communicator("world", "control").all_reduce(other, op="max").wait()
    assert torch.equal(told, other)  # every rank has the slowest one's times


def ds(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ds_core.cli.main", "comm", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_alone_it_starts_ranks(tmp_path: Path) -> None:
    flags = ("--ops", "all_gather", "--sizes", "4K,64K", "--codecs", "none,int8", "--seconds", "0.2")
    done = ds("--nproc", "2", "--json", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["bytes"], row["codec"], row["ranks"]) for row in rows] == [
        *((4096, "none", 2), (65536, "none", 2)),
        *((4096, "int8", 2), (65536, "int8", 2)),
    ]
    assert all(row["busbw"] == pytest.approx(row["algbw"] / 2) for row in rows)
    assert list(tmp_path.iterdir()) == []  # no logs are left


def test_under_ds_launch_it_is_a_rank(tmp_path: Path) -> None:
    launch = ["launch", "--nproc", "3", "--logs", str(tmp_path / "logs"), "-m", "ds_core.cli.main"]
    words = ["comm", "bench", "--ops", "broadcast", "--sizes", "1K", "--seconds", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "ds_core.cli.main", *launch, *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "between 3 ranks on cpu" in done.stdout
    assert done.stdout.count("broadcast") == 1  # one rank speaks


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--ops", "all_sum"), "there is no op 'all_sum'"),
        (("--sizes", "3x"), "'3x': a number of bytes, as 65536, 64K or 1M"),
        (("--codecs", "int7"), "there is no codec 'int7'; allowed: none, bf16, fp16"),
        (("--seconds", "0"), "--seconds 0: allowed are numbers above 0"),
        (("--nproc", "none"), "--nproc 'none': allowed are auto and whole numbers from 1"),
    ],
)
def test_bad_flags_get_one_sentence(
    flags: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["comm", "bench", *flags])
    except SystemExit as ended:  # of argparse
        code = ended.code
    assert code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_help_line_is_the_one_that_ds_shows(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "measure the collectives between ranks" in capsys.readouterr().out
