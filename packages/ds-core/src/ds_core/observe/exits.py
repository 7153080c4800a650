"""Why a process ended: its exit code in words, and whether its error is only the echo of another rank's."""

from __future__ import annotations

import re
import signal

_HINTS = {
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "often /dev/shm or a memory-mapped file that ran out of space",
    signal.SIGABRT: "native code gave up: look above for its message",
    signal.SIGILL: "the binary uses instructions this CPU does not have",
}


TRACEBACK = "Traceback (most recent call last):"
_ECHO_OF_ANOTHER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|remote process exited|"
    r"recvValue failed|failed to recv|Gloo connectFullMesh failed|ncclRemoteError|Socket Timeout|DesyncError"
)


def lost_connection(text: str) -> bool:
    """Whether a traceback ends in an error that a rank gets because another one is gone."""
    return TRACEBACK in text and _ECHO_OF_ANOTHER.search(text.rpartition(TRACEBACK)[2]) is not None


def describe_exit(code: int, *, hint: bool = True) -> str:
    """Say an exit code of `subprocess` or `multiprocessing` (negative: a signal) in words."""
    # A shell or a container reports a signal as 128 + n.
    number = -code if code < 0 else code - 128 if 128 < code < 128 + signal.NSIG else 0
    if not number:
        return f"exit code {code}"
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"killed by signal {number}"
    why = f": {_HINTS[name]}" if hint and name in _HINTS else ""
    return f"killed by {name.name} ({number}){why}"
