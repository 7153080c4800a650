"""After a failed run: which member failed first, why, in its own words, and where the rest is."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TextIO

from ds_core.cli.group import Ended, Result
from ds_core.observe.exits import TRACEBACK, describe_exit, lost_connection

_TAIL_BYTES = 1 << 16
_SHOWN_LINES = 100
_PLAIN_LINES = 20  # of a log without a traceback
_CHAIN = ("The above exception was the direct cause", "During handling of the above exception")
_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch puts it before each line of a traceback


def report(result: Result, out: TextIO) -> int:
    """Write what went wrong, the cause last, and return the exit code for the whole job."""
    failed = result.failed
    if not failed:
        if result.interrupted:
            out.write(f"ds launch: stopped by {signal.Signals(result.interrupted).name}\n")
            return 128 + result.interrupted
        return 0
    first, text = _first_cause(result)
    others = [e for e in result.ended if e is not first]
    out.write("\n")
    for ended in others:
        how = "stopped" if ended.stopped else "finished" if ended.code == 0 else describe_exit(ended.code)
        out.write(f"{ended.member.name}: {how}; log: {ended.member.log}\n")
    if text:
        out.write(f"--- {first.member.name}, the first to fail:\n{text}\n---\n")
    out.write(f"ds launch: {_verdict(first, text, result.memory)}; log: {first.member.log}\n")
    out.flush()
    code = failed[0].code if first.stopped else first.code
    return 128 - code if code < 0 else code


def _verdict(first: Ended, text: str, memory: str | None) -> str:
    place = f"{first.member.name} (pid {first.pid}) on {os.uname().nodename}"
    if first.stopped:  # it had failed already, and was still on its way out
        return f"{place} failed after {first.seconds:.1f} s"
    if first.member.message is not None and first.code == 255:
        return f"{first.member.name} could not be reached, or its connection broke ({first.member.argv[0]})"
    # A Python error may still end in an abort, when torch's threads are torn down: then it is not the cause.
    why = describe_exit(first.code, hint=TRACEBACK not in text)
    if memory and first.code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        why = f"{why}: {memory}"
    return f"{place} failed after {first.seconds:.1f} s: {why}"


def _first_cause(result: Result) -> tuple[Ended, str]:
    """The first to fail, passing over those that only lost their connection to another that failed."""
    texts = {id(e): _last_words(e.member.log) for e in result.ended if e.code != 0 or e.stopped}
    first = result.failed[0]
    candidates = [*result.failed, *(e for e in result.ended if e.stopped and TRACEBACK in texts[id(e)])]
    if lost_connection(texts[id(first)]):
        first = next((e for e in candidates if not lost_connection(texts[id(e)])), first)
    return first, texts[id(first)]


def _last_words(log: Path) -> str:
    """The last traceback in a log with what it was caused by, else the last lines."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace").replace("\r\n", "\n")
    except OSError as error:
        return f"(no log: {error})"
    lines = [_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [i for i, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return "\n".join(lines[-_PLAIN_LINES:])
    begin = starts.pop()
    while starts and any(line.startswith(_CHAIN) for line in lines[starts[-1] : begin]):
        begin = starts.pop()
    kept = lines[begin:]
    if len(kept) > _SHOWN_LINES:
        half = _SHOWN_LINES // 2
        kept = [*kept[:half], f"... {len(kept) - _SHOWN_LINES} lines, see the log ...", *kept[-half:]]
    return "\n".join(kept)
