"""The rank harness: what it passes, what it returns, and what it says when a rank fails, dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_core.testing.distributed import RankFailure, distributed, run_ranks
from ds_core.testing.rank import decode, encode


@pytest.mark.parametrize("name", ["gloo", "a b;$(c)"])
@distributed(world_size=2)
def test_parameters_and_fixtures_arrive(rank: int, world: int, name: str, tmp_path: Path) -> None:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert (world, total.item()) == (2, 3.0)
    assert name in ("gloo", "a b;$(c)")
    (tmp_path / f"{rank}").write_text(name)
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@distributed(world_size=3)
def test_a_dtype_crosses_and_rank_is_optional(dtype: torch.dtype) -> None:
    assert torch.ones(2, dtype=dtype).dtype is dtype
    assert os.environ["WORLD_SIZE"] == "3"
    assert torch.get_num_threads() == 1


def report_rank(rank: int, world: int, folder: Path, pair: tuple[int, str]) -> dict[str, object]:
    files = sorted(p.name for p in folder.iterdir())
    dist.barrier()
    (folder / f"{world}-{rank}").touch()
    return {"rank": rank, "files": files, "pair": pair, "env": os.environ.get("DS_TEST_MARK")}


def test_several_worlds_in_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_TEST_MARK", "seen")
    two = run_ranks(report_rank, 2, folder=tmp_path, pair=(1, "x"))
    three = run_ranks(report_rank, 3, folder=tmp_path, pair=(1, "x"))
    assert [r["rank"] for r in three] == [0, 1, 2]
    assert two[0] == {"rank": 0, "files": [], "pair": (1, "x"), "env": "seen"}
    assert three[2]["files"] == ["2-0", "2-1"]


def fail_on_one(rank: int) -> None:
    sys.stdout.write(f"output of {rank}\n")
    if rank == 1:
        raise ValueError("planted\nin two lines")
    dist.barrier()


def test_a_failing_rank_fails_the_test_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(fail_on_one, 2)
    message = str(caught.value)
    assert message.startswith("[rank 1] ValueError: planted")
    assert 'raise ValueError("planted\\nin two lines")' in message
    assert "in run_rank" not in message
    assert {"[rank 0] output of 0", "[rank 1] output of 1"} <= set(capsys.readouterr().out.splitlines())


def die_on_one(rank: int, number: int, nap_s: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), number)
    time.sleep(nap_s)


def test_a_dying_rank_is_named_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_core.testing.distributed.GRACE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"^\[rank 1\] died .*killed by SIGKILL \(9\)") as caught:
        run_ranks(die_on_one, 2, number=int(signal.SIGKILL), nap_s=60)
    assert time.monotonic() - start < 30
    assert "[rank 0] still running 0.5 s after rank 1 failed" in str(caught.value)
    assert "in die_on_one" in str(caught.value)


def test_a_crash_shows_where_it_was() -> None:
    with pytest.raises(RankFailure, match=r"^\[rank 1\] died .*killed by SIGSEGV \(11\)") as caught:
        run_ranks(die_on_one, 2, number=int(signal.SIGSEGV), nap_s=0)
    assert "in die_on_one" in str(caught.value)


def leave_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def test_an_exit_without_a_result_is_a_failure() -> None:
    with pytest.raises(RankFailure, match=r"\[rank 1\] died before its test ended: exit code 3"):
        run_ranks(leave_on_one, 2)


def hang_on_one(rank: int, folder: Path) -> None:
    if rank == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "pid").write_text(str(child.pid))
        time.sleep(60)
    dist.barrier()


def test_a_hang_is_cut_with_every_ranks_stack(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(hang_on_one, 2, timeout=2, folder=tmp_path)
    assert time.monotonic() - start < 15
    message = str(caught.value)
    for rank in (0, 1):
        assert f"[rank {rank}] still running after 2 s" in message
    assert message.count("in hang_on_one") == 2
    assert "in barrier" in message
    child = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]


def skip_everywhere() -> None:
    pytest.skip("no such device")


def test_a_skip_in_the_ranks_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="no such device"):
        run_ranks(skip_everywhere, 2)


def test_what_cannot_cross_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"folder=.* is a object, which cannot cross"):
        run_ranks(hang_on_one, 2, folder=object())
    with pytest.raises(ValueError, match=r"is local: .* move it to the top level"):
        run_ranks(lambda: None, 2)


def test_values_come_back_equal() -> None:
    value = [None, True, 1, 0.1, "x", (1, (2,)), {"tuple": [1]}, Path("/a b"), torch.float16]
    back = decode(encode(value, "value"))
    assert back == value
    assert back[-1] is torch.float16


def nothing() -> None:
    return None


def test_two_ranks_start_in_tenths_of_a_second() -> None:
    run_ranks(nothing, 2)
    times = []
    for _ in range(3):
        start = time.monotonic()
        run_ranks(nothing, 2)
        times.append(time.monotonic() - start)
    assert min(times) < 1.0, "the fork server seems not to have preloaded torch"
