"""A network that is slow for real: collectives take the time that its rate says, and nothing of it stays."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "netns.py"
BENCHMARK = ROOT / "packages" / "ds-comm" / "benchmarks" / "network.py"
GPT = ROOT / "packages" / "ds-zero" / "benchmarks" / "gpt.py"
RANKS = Path(__file__).with_name("slow_ranks.py")
UNAVAILABLE = 3
RATE = 100e6 / 8  # bytes per second
BURST = 12_500  # bytes that tbf lets through at once at this rate
MEASURED_BYTES = RATE / 2  # half a second
FRAME, PAYLOAD = 1514, 1448  # bytes of an Ethernet frame, and of it what TCP hands on
SLACK_S = 0.012  # round trips, wakeups of busy ranks, and the codec's arithmetic


def start(*command: str, ranks: int = 2) -> subprocess.Popen[str]:
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(TOOL), "--ranks", str(ranks), "--rate", "100mbit", "--timeout", "100", "--"]
    return subprocess.Popen(
        [*line, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    if process.returncode == UNAVAILABLE:
        pytest.skip(err.strip().splitlines()[-1])
    return process.returncode, out, err


def namespaces(owner: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"ds-net-{owner}-")]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    code, out, err = finish(start(sys.executable, str(RANKS)))
    assert code == 0, out + err
    told = [line for line in out.splitlines() if line.startswith("[rank 0] @")]
    found: dict[str, Any] = json.loads(told[-1].removeprefix("[rank 0] @"))
    return found


@pytest.mark.parametrize("operation", ["all_reduce", "plain", "coded"])
def test_a_collective_takes_the_time_that_its_bytes_take(figures: dict[str, Any], operation: str) -> None:
    payload = figures["wire"][operation]
    row = figures["found"][operation]
    assert row["seconds"] >= (payload - BURST) / RATE
    assert row["seconds"] <= payload * FRAME / PAYLOAD / RATE + SLACK_S
    # Frames, a barrier's messages and acknowledgements come on top of the payload, and nothing else.
    assert payload <= row["bytes"] <= 1.1 * payload + 4096


def test_a_quarter_of_the_bytes_takes_a_quarter_of_the_time(figures: dict[str, Any]) -> None:
    bytes_ratio = figures["wire"]["coded"] / figures["wire"]["plain"]
    assert 0.25 <= bytes_ratio <= 0.27
    found = figures["found"]
    ratio = found["coded"]["seconds"] / found["plain"]["seconds"]
    assert bytes_ratio - BURST / figures["wire"]["plain"] <= ratio
    assert ratio <= bytes_ratio + SLACK_S / found["plain"]["seconds"]


def test_the_rate_was_measured_before() -> None:
    code, out, err = finish(start(sys.executable, "-c", "print('here')", ranks=3))
    assert code == 0, err
    first = out.splitlines()[0]
    assert first.startswith("netns: 3 nodes at 100mbit: ")
    measured = float(first.split()[5])
    most = 100 * PAYLOAD / FRAME * (1 + BURST / MEASURED_BYTES)
    assert 0.9 * most <= measured <= most + 0.05  # one decimal is printed
    assert sorted(out.splitlines()[1:]) == [f"[rank {rank}] here" for rank in range(3)]


FAILS = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"


def test_a_rank_that_fails_ends_the_others_and_the_network() -> None:
    began = time.monotonic()
    process = start(sys.executable, "-c", FAILS)
    code, _, err = finish(process)
    assert code == 1
    assert "rank 1 ended with exit status 7; the others were stopped" in err
    assert time.monotonic() - began < 30
    assert namespaces(process.pid) == []


WAITS = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"


def wait_for_ranks(process: subprocess.Popen[str]) -> list[int]:
    """Their process ids, once both run."""
    assert process.stdout is not None
    found: list[int] = []
    while len(found) < 2:
        line = process.stdout.readline()
        if not line:
            finish(process)
            pytest.fail("the ranks never ran")
        if "] pid " in line:
            found.append(int(line.split()[-1]))
    return found


def running(pid: int) -> bool:
    """Zombies, whose parent was killed and whose new one has not looked yet, do not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_signal_ends_ranks_and_network() -> None:
    process = start(sys.executable, "-c", WAITS)
    ranks = wait_for_ranks(process)
    assert len(namespaces(process.pid)) == 2
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code == 128 + signal.SIGTERM
    assert namespaces(process.pid) == []
    assert not any(running(pid) for pid in ranks)


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    process = start(sys.executable, "-c", WAITS)
    ranks = wait_for_ranks(process)
    process.kill()
    finish(process)
    assert len(namespaces(process.pid)) == 2  # nobody could
    code, _, err = finish(start("true"))
    assert code == 0, err
    assert namespaces(process.pid) == []
    assert not any(running(pid) for pid in ranks)


def test_the_benchmark_tells_what_each_contender_sends_and_how_long_that_takes(tmp_path: Path) -> None:
    names = ["DDP", "ours, stage 0, int4"]
    command = [sys.executable, str(BENCHMARK), "--size", "tiny", "--rates", "100mbit", "--rounds", "1"]
    command += ["--contenders", ";".join(names), "--out", str(tmp_path / "network.jsonl")]
    code, out, err = finish(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )
    assert code == 0, out + err
    record = json.loads((tmp_path / "network.jsonl").read_text())
    assert record["skipped"] == {}
    rows = {row["contender"]: row for row in record["rows"]}
    assert sorted(rows) == sorted(names)
    numel = sum(p.numel() for p in runpy.run_path(str(GPT))["build"]("tiny").parameters())
    # Two ranks: each sends all of its fp32 gradients once, or half a byte of each and a scale for 256.
    for name, payload in (("DDP", 4 * numel), ("ours, stage 0, int4", (1 / 2 + 4 / 256) * numel)):
        row = rows[name]
        assert payload <= row["node_sent_bytes"] <= 1.15 * payload + 8192, row
        assert row["step_s"]["best"] >= (payload - BURST) / RATE, row
        assert row["tokens_per_s"] == pytest.approx(2 * 256 / row["step_s"]["median"], rel=1e-2)
    assert payload <= row["logged_bytes"] <= 1.05 * payload + 1024
