"""What a process's exit code means, in words a person can act on."""

from __future__ import annotations

import signal

_HINTS = {
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "often /dev/shm or a memory-mapped file that ran out of space",
    signal.SIGABRT: "native code gave up: look above for its message",
    signal.SIGILL: "the binary uses instructions this CPU does not have",
}


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
