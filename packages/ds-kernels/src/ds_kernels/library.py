"""Finds a family's compiled library: the wheel's if it fits the sources, else the cache's, else builds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from ds_kernels import build as driver
from ds_kernels.build import BuildError, Compiler


@dataclass(frozen=True)
class Library:
    """A loaded shared library and how it was come by."""

    handle: ctypes.CDLL
    path: Path
    origin: str


def open_library(family: str) -> Library:
    """Load the family's library. Raises BuildError when there is none and none can be built."""
    path, origin, using = _find(family)
    if using is not None:
        path = driver.build(family, path.parent, using)
    try:
        return Library(ctypes.CDLL(str(path)), path, origin)
    except OSError as error:
        raise BuildError(family, f"{path} does not load ({error}); delete it to build it anew") from error


def outlook(family: str) -> str:
    """What `open_library` would find, without building anything. Raises BuildError."""
    _, origin, using = _find(family)
    return origin if using is None else f"built on first use, by {using.version}"


def _find(family: str) -> tuple[Path, str, Compiler | None]:
    """(where the library is or will be, how it was come by, who must build it yet)."""
    shipped = driver.PREBUILT / driver.library_name(family)
    stamp = shipped.with_name(shipped.name + ".key")
    if shipped.exists() and stamp.exists() and stamp.read_text() == driver.source_key(family):
        return shipped, "came with the wheel", None
    using = driver.compiler(family)
    cached = driver.cached_path(family, using)
    if cached.exists():
        return cached, f"built before by {using.version}", None
    return cached, f"built now by {using.version}", using
