"""Which engine runs here, and why not a better one."""

from __future__ import annotations

import errno
import logging
import os
from functools import cache
from typing import Literal, NamedTuple, get_args

from ds_kernels.aio.fallback import PythonEngine
from ds_kernels.aio.job import Engine, Settings
from ds_kernels.aio.native import KINDS, NativeEngine, probe
from ds_kernels.build import ADVICE, BuildError
from ds_kernels.library import outlook
from ds_kernels.registry import KernelUnavailable

EngineName = Literal["io_uring", "libaio", "threads", "python"]
NAMES: tuple[EngineName, ...] = get_args(EngineName)  # the best first
_HINTS = {
    ("io_uring", errno.EPERM): "; see /proc/sys/kernel/io_uring_disabled and the container's seccomp filter",
    ("io_uring", errno.ENOSYS): "; it needs Linux 5.6 and headers of that age",
    ("io_uring", errno.ENOMEM): "; raise `ulimit -l`",
    ("libaio", errno.EAGAIN): "; raise /proc/sys/fs/aio-max-nr",
}
_log = logging.getLogger("ds_kernels")


class EngineRow(NamedTuple):
    """One engine: whether it can be had, whether an AsyncIO made now would use it, and why (not)."""

    engine: EngineName
    there: bool
    used: bool
    why: str


def forced(argument: str | None) -> EngineName | None:
    """The engine that the caller, DS_AIO or DS_KERNELS=reference insists on."""
    name = argument or os.environ.get("DS_AIO") or None
    if name is None and os.environ.get("DS_KERNELS") == "reference":
        return "python"
    if name not in (None, *NAMES):
        said = "engine" if argument else "DS_AIO"
        raise ValueError(f"{said}={name!r}: allowed are {', '.join(map(repr, NAMES))}, or leave it out")
    return name


def make_engine(wanted: EngineName | None, settings: Settings) -> tuple[Engine, str]:
    """The wanted engine, or the best that can be had, and why. Raises: KernelUnavailable."""
    missing: list[str] = []
    for name in (wanted,) if wanted else NAMES:
        if name == "python":
            return PythonEngine(settings), "; ".join(missing) or "asked for"
        try:
            return NativeEngine(name, settings), "asked for" if wanted else "; ".join(
                missing
            ) or "the first choice"
        except BuildError as error:
            if wanted:
                raise KernelUnavailable(str(error)) from error
            missing = [f"no library: {error.reason}"]
            _warn(error.reason)
        except OSError as error:
            missing.append(f"no {name}: {_said(name, error.errno)}")
    raise KernelUnavailable(f"aio engine {wanted!r} cannot be had: {missing[0]}; allowed here: engine=None")


def describe() -> list[EngineRow]:
    """Every engine, the best first, and which one an AsyncIO would use. Builds nothing."""
    insisted, rows = forced(None), []
    used: EngineName | None = None
    for name in NAMES:
        there, why = _outlook(name)
        if used is None and there and insisted in (None, name):
            used = name
        if there and used != name:
            why += f"; {insisted or used} {'is forced' if insisted else 'comes first'}"
        rows.append(EngineRow(name, there, used == name, why))
    return rows


def _outlook(name: EngineName) -> tuple[bool, str]:
    if name not in KINDS:
        return True, "always there"
    try:
        origin = outlook("aio")
        error = 0 if origin.startswith("built on first use") else probe(name)
    except BuildError as failed:
        return False, failed.reason
    return error == 0, _said(name, error) if error else origin


def _said(name: str, code: int | None) -> str:
    return os.strerror(code or 0) + _HINTS.get((name, code or 0), "")


@cache
def _warn(reason: str) -> None:
    """Once per reason."""
    _log.warning("aio: slower than it could be, in Python threads, because %s\n%s", reason, ADVICE)
