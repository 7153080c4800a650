"""What counts as evidence for an out-of-memory kill, and how exit codes read."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ds_core.observe.exits import describe_exit
from ds_core.observe.host import GIB, MemoryWatch, read_memory, usable_cores


def host(folder: Path, available: int, kills: int = 0, total: int = 100) -> Path:
    """A /proc with memory figures in GiB."""
    folder.mkdir(exist_ok=True)
    lines = [f"MemTotal: {total * GIB // 1024} kB", f"MemAvailable: {available * GIB // 1024} kB"]
    (folder / "meminfo").write_text("\n".join(lines))
    (folder / "vmstat").write_text(f"nr_free_pages 1\noom_kill {kills}\n")
    return folder


def test_a_full_host_is_evidence_even_when_the_memory_is_back(tmp_path: Path) -> None:
    watch = MemoryWatch(host(tmp_path / "proc", 60), tmp_path / "none")
    assert watch.evidence() is None
    host(tmp_path / "proc", 2)
    watch.sample()
    host(tmp_path / "proc", 90)
    assert watch.evidence() == "host memory peaked at 98.0 of 100.0 GiB, likely the out-of-memory killer"


def test_the_kernels_count_is_evidence(tmp_path: Path) -> None:
    watch = MemoryWatch(host(tmp_path / "proc", 60, kills=3), tmp_path / "none")
    host(tmp_path / "proc", 60, kills=4)
    assert "counted an out-of-memory kill" in str(watch.evidence())


def test_a_containers_limit_counts_where_it_is_tighter(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    proc = host(tmp_path / "proc", 60)
    assert read_memory(proc, group).total == 100 * GIB  # type: ignore[union-attr]
    (group / "memory.max").write_text(f"{8 * GIB}\n")
    (group / "memory.current").write_text(f"{7 * GIB}\n")
    assert read_memory(proc, group).total == 8 * GIB  # type: ignore[union-attr]
    watch = MemoryWatch(proc, group)
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert str(watch.evidence()).startswith("host memory peaked at 7.0 of 8.0 GiB")


def test_nothing_to_read_is_no_evidence(tmp_path: Path) -> None:
    assert read_memory(tmp_path, tmp_path) is None
    assert MemoryWatch(tmp_path, tmp_path).evidence() is None
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "exit code 1"),
        (-9, "killed by SIGKILL (9)"),
        (137, "killed by SIGKILL (9)"),
        (-11, "killed by SIGSEGV (11): a crash in native code"),
        (-signal.SIGRTMIN - 1, f"killed by signal {signal.SIGRTMIN + 1}"),
        (255, "exit code 255"),
    ],
)
def test_exit_codes_are_decoded(code: int, said: str) -> None:
    assert describe_exit(code) == said
