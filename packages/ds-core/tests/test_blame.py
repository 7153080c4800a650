"""What is picked out of a rank's log, and how the verdict reads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ds_core.cli.blame import report
from ds_core.cli.group import Ended, Member, Result

CHAIN = """\
step 1
Traceback (most recent call last):
  old, and unrelated
KeyError: 'handled'
step 2
Traceback (most recent call last):
  File "a.py", line 1
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3
ValueError: planted
terminate called without an active exception
"""


def verdict(log: Path, text: str, code: int = 1, memory: str | None = None) -> tuple[int, list[str]]:
    log.write_text(text)
    member = Member("rank 1", ["python"], {}, log)
    out = io.StringIO()
    result = Result([Ended(member, 7, code, 1.5, stopped=False)], memory=memory)
    return report(result, out), out.getvalue().strip().splitlines()


@pytest.mark.parametrize("prefix", ["", "[rank1]: "])
def test_the_last_traceback_is_shown_with_its_causes(tmp_path: Path, prefix: str) -> None:
    text = "".join(f"{prefix}{line}" for line in CHAIN.splitlines(keepends=True))
    code, lines = verdict(tmp_path / "log", text, code=-6)
    assert code == 134
    assert lines[0] == "--- rank 1, the first to fail:"
    assert lines[1:-2] == CHAIN.splitlines()[5:]
    assert "failed after 1.5 s: killed by SIGABRT (6); log: " in lines[-1]


def test_without_a_traceback_the_last_lines_and_a_hint_are_shown(tmp_path: Path) -> None:
    _, lines = verdict(tmp_path / "log", "".join(f"line {i}\n" for i in range(100)), code=-11)
    assert lines[1:-2] == [f"line {i}" for i in range(80, 100)]
    assert "killed by SIGSEGV (11): a crash in native code; log: " in lines[-1]


def test_memory_is_named_only_with_evidence_and_only_for_a_kill(tmp_path: Path) -> None:
    said = "host memory peaked at 251.0 of 256.0 GiB, likely the out-of-memory killer"
    assert f"killed by SIGKILL (9): {said}; log" in verdict(tmp_path / "log", "", -9, said)[1][-1]
    assert "killed by SIGKILL (9); log" in verdict(tmp_path / "log", "", -9)[1][-1]
    assert "host memory" not in verdict(tmp_path / "log", "", 1, said)[1][-1]


def test_a_long_traceback_is_shortened_in_the_middle(tmp_path: Path) -> None:
    long = "Traceback (most recent call last):\n" + "  frame\n" * 5000 + "RecursionError: deep\n"
    _, lines = verdict(tmp_path / "log", long)
    assert len(lines) < 110
    assert lines[-3] == "RecursionError: deep"
    assert any("lines, see the log" in line for line in lines)


def test_success_and_interruption(tmp_path: Path) -> None:
    out = io.StringIO()
    ended = [Ended(Member("rank 0", [], {}, tmp_path / "log"), 7, 0, 1.0, stopped=False)]
    assert report(Result(ended), out) == 0
    assert out.getvalue() == ""
    assert report(Result([], interrupted=15), out) == 143
    assert out.getvalue() == "ds launch: stopped by SIGTERM\n"


def test_who_only_says_that_ranks_parted_is_not_the_first_cause(tmp_path: Path) -> None:
    texts = {
        "rank 0": "Traceback (most recent call last):\n  File\nds_core.DesyncError: ranks\n",
        "rank 1": "Traceback (most recent call last):\n  File\nKeyError: 'a bad row'\n",
    }
    ended = []
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        ended.append(Ended(Member(name, ["python"], {}, tmp_path / name), 7, 1, 1.5, stopped=False))
    out = io.StringIO()
    report(Result(ended), out)
    assert "--- rank 1, the first to fail:" in out.getvalue()
