"""The fastest setting wins, it can be loaded again, and no run leaves a file, however it ends."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_kernels.aio import AsyncIO
from ds_offload import io_bench
from ds_offload.io_bench import IoReport, IoSetting, Sweep, bench_io, io_settings, plan_sweep, write_settings

MIB = 1 << 20
SMALL = Sweep(engines=("threads",), block_sizes=(65536, 1 << 18), queue_depths=(2, 4), threads=(1,))


def test_every_possible_combination_the_likeliest_first() -> None:
    found = plan_sweep(Sweep(), 1 << 30, ["io_uring", "threads"])
    assert found[0] == IoSetting("io_uring", MIB, 64, 1)
    assert len(found) == len(set(found)) == 3 * 4 * 3 + 3 * 2
    for setting in found:
        AsyncIO(**asdict(setting) | {"engine": "python"}).close()  # what it would refuse is not there
    assert all(
        2 * s.block_size * s.queue_depth <= 16 * MIB for s in plan_sweep(Sweep(), 16 * MIB, ["libaio"])
    )
    assert {s.queue_depth for s in found if s.engine == "threads"} == {8, 32}


def test_too_few_bytes_for_any_setting() -> None:
    with pytest.raises(ValueError, match=f"give {2 * MIB} or more"):
        plan_sweep(Sweep(block_sizes=(MIB,), queue_depths=(1,), threads=(1,)), MIB, ["io_uring"])


@pytest.mark.parametrize("name", ["block_sizes", "queue_depths", "threads"])
@pytest.mark.parametrize("values", [(), (0,), (1, -4)])
def test_sweeps_that_cannot_be(name: str, values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*allowed are whole numbers from 1"):
        Sweep(**{name: values})


def test_the_fastest_wins_after_three_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of known speed, with one figure of a slow setting that is far too good."""
    lucky = itertools.count()

    def sample(self: Any, io: AsyncIO, setting: IoSetting, op: str) -> float:
        if setting == IoSetting("python", 65536, 4, 4) and next(lucky) < 2:
            return 1e12
        return setting.block_size * setting.queue_depth * (2.0 if op == "read" else 1.0)

    monkeypatch.setattr(io_bench._Runner, "_sample", sample)
    sweep = Sweep(
        engines=("python",), block_sizes=(65536, MIB), queue_depths=tuple(range(2, 10)), threads=(1,)
    )
    shares: list[float] = []
    report = bench_io(tmp_path, seconds=60, num_bytes=32 * MIB, sweep=sweep, told=shares.append)
    assert report.best.setting == IoSetting("python", MIB, 9, 9)
    assert report.best.rate("read") == 2 * report.best.rate("write") == 18 * MIB
    assert report.best.score == pytest.approx(12 * MIB)  # 18 and 9: 1/18 + 1/9 seconds for 2
    tries = [len(result.samples["read"]) for result in report.results]
    assert tries == [7, 7, 7, 3, *[1] * 12]
    assert not report.skipped
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_real_run_leaves_nothing_and_can_be_loaded(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    state = torch.get_rng_state()
    report = bench_io(disk, seconds=0.5, num_bytes=8 * MIB, sweep=SMALL)
    assert list(disk.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(result.rate(op) > 0 for result in report.results for op in ("read", "write"))
    write_settings(report, disk / "ds_io.json")
    assert os.listdir(disk) == ["ds_io.json"]
    for path in (disk, disk / "ds_io.json"):
        settings = io_settings(path)
        assert settings == asdict(report.best.setting)
        with AsyncIO(**settings) as io:
            assert io.engine == "threads"
            io.write(disk / "x", torch.arange(100)).result()


def test_a_slow_disk_is_tried_at_least_once(tmp_path: Path) -> None:
    report = bench_io(tmp_path, seconds=1e-6, num_bytes=8 * MIB, sweep=SMALL)
    assert len(report.results) == 1
    assert len(report.skipped) == 3
    assert report.results[0].score > 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    def told(share: float) -> None:
        assert os.listdir(tmp_path) == []  # not even while it runs
        raise stop("now")

    with pytest.raises(stop, match="now"):
        bench_io(tmp_path, seconds=5, num_bytes=8 * MIB, sweep=SMALL, told=told)
    assert os.listdir(tmp_path) == []


def test_runs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder, settings, said in (
        (tmp_path / "none", {}, "no such folder"),
        (file, {}, "is a file: allowed are folders"),
        (tmp_path, {"seconds": 0}, "seconds=0: allowed"),
        (tmp_path, {"seconds": float("nan")}, "seconds=nan: allowed"),
        (tmp_path, {"num_bytes": -1}, "bytes=-1: allowed"),
        (tmp_path, {"num_bytes": 1 << 60}, f"bytes are free, the test file takes {1 << 60}"),
    ):
        with pytest.raises(ValueError, match=said):
            bench_io(folder, **settings)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["file"]


def report_of(engine: str) -> IoReport:
    result = io_bench.IoResult(IoSetting(engine, 65536, 2, 1), {"read": [1.0], "write": [1.0]})
    return IoReport("here", True, "", 1, (result,), ())


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    file = tmp_path / "ds_io.json"
    with pytest.raises(ValueError, match="no such file; `ds io bench"):
        io_settings(tmp_path)
    for text in ("", "[]", "{}", '{"best": {"engine": 1}}', '{"best": 3, "format": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="is not a file of `ds io bench`"):
            io_settings(file)
    write_settings(report_of("python"), file)
    document = json.loads(file.read_text())
    assert io_settings(file)["engine"] == "python"
    file.write_text(json.dumps(document | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        io_settings(file)
    write_settings(report_of("warp"), file)
    with pytest.raises(ValueError, match="engine 'warp' is not here; there are"):
        io_settings(file)
