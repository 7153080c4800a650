"""Finds a family's compiled library: the wheel's if it fits the sources, else the cache's, else builds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from ds_kernels import build as driver
from ds_kernels.build import BuildError


@dataclass(frozen=True)
class Library:
    """A loaded shared library and how it was come by."""

    handle: ctypes.CDLL
    path: Path
    origin: str


def open_library(family: str) -> Library:
    """Load the family's library. Raises BuildError when there is none and none can be built."""
    path, origin = _find(family)
    try:
        return Library(ctypes.CDLL(str(path)), path, origin)
    except OSError as error:
        raise BuildError(family, f"{path} does not load ({error}); delete it to build it anew") from error


def _find(family: str) -> tuple[Path, str]:
    shipped = driver.PREBUILT / driver.library_name(family)
    stamp = shipped.with_name(shipped.name + ".key")
    if shipped.exists() and stamp.exists() and stamp.read_text() == driver.source_key(family):
        return shipped, "came with the wheel"
    using = driver.compiler(family)
    cached = driver.cached_path(family, using)
    if cached.exists():
        return cached, f"built before by {using.version}"
    return driver.build(family, cached.parent, using), f"built now by {using.version}"
