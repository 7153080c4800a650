"""Compiles one folder of kernels/ into one shared library, for the cache or for a wheel; needs no torch.

Called in three ways: by `library.py` on first use, by `ds-kernels build` (cli.py), and by `hatch_build.py`
for a wheel.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "sources"
PREBUILT = HERE / "prebuilt"

# -ffp-contract=off is part of the contract: every implementation gives the same bits (common/vector.h).
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-Wl,--as-needed"),
)
COMMON = "common"  # the folder of headers that families share
ADVICE = (
    "Install g++ (Debian and Ubuntu: apt install g++) or point CXX at a C++17 compiler with OpenMP; "
    "DS_KERNELS=reference takes the reference on purpose and says nothing."
)


class BuildError(RuntimeError):
    """A library could not be built; `reason` is the compiler's own first error."""

    def __init__(self, family: str, reason: str, log: str = "") -> None:
        self.family, self.reason, self.log = family, reason, log
        super().__init__(
            f"cannot build the {family!r} kernels: {reason}\n{ADVICE}" + (f"\n\n{log}" if log else "")
        )


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answered `--version`."""

    command: tuple[str, ...]
    version: str


def families() -> list[str]:
    """Names of the folders that have a native CPU source."""
    return sorted({path.parent.name for path in SOURCES.glob("*/*_cpu.cpp")})


def library_name(family: str) -> str:
    """File name of the family's shared library."""
    return f"libds_{family}.so"


def cache_root() -> Path:
    """Where libraries built on first use are kept."""
    own = os.environ.get("DS_KERNELS_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ds-kernels"


def source_key(family: str) -> str:
    """Hash of what the library means: sources, headers, flags, machine. Independent of the compiler."""
    digest = hashlib.sha256(repr((FLAGS, platform.system(), platform.machine())).encode())
    headers = [path for folder in (family, COMMON) for path in (SOURCES / folder).glob("*.h")]
    for path in sorted(_sources(family) + headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler(family: str) -> Compiler:
    """The compiler of CXX, else the first of g++, c++, clang++ that answers. Raises BuildError."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    said = "no C++ compiler found: looked for g++, c++ and clang++ on PATH"
    for command in candidates:
        found = shutil.which(command[0])
        if found is None:
            said = f"CXX={named}: no such program" if named else said
            continue
        version, said = _version((found, *command[1:]))
        if version:
            return Compiler((found, *command[1:]), version)
    raise BuildError(family, said)


def cached_path(family: str, using: Compiler) -> Path:
    """Where the library that this compiler makes of these sources lives in the user's cache."""
    stamp = hashlib.sha256(repr((using.command, using.version)).encode()).hexdigest()[:8]
    return cache_root() / f"{family}-{source_key(family)}-{stamp}" / library_name(family)


def build(family: str, out: Path, using: Compiler | None = None) -> Path:
    """Build the family's library into folder `out` and return its path; no work if it is there.

    Safe from many processes at once: one compiles, the others wait, and one that dies lets go by itself.
    Raises: BuildError with the compiler's own first error.
    """
    if family not in families():
        raise BuildError(family, f"no such family; there are: {', '.join(families())}")
    target = out / library_name(family)
    stamp = out / f"{library_name(family)}.key"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out / f".{family}.lock"):
            if target.exists() and stamp.exists() and stamp.read_text() == source_key(family):
                return target
            _sweep(out)
            with tempfile.TemporaryDirectory(prefix=f"{_WORK}{family}-", dir=out) as work:
                made = _compile(family, Path(work), using or compiler(family))
                key = Path(work) / "key"
                key.write_text(source_key(family))
                os.replace(made, target)
                os.replace(key, stamp)
    except OSError as error:
        raise BuildError(
            family, f"{out}: {error.strerror or error}; set DS_KERNELS_CACHE to a writable folder"
        ) from error
    return target


_WORK = ".work-"


def _sources(family: str) -> list[Path]:
    return sorted((SOURCES / family).glob("*_cpu.cpp"))


@cache
def _version(command: tuple[str, ...]) -> tuple[str, str]:
    """(first line of --version or "", what went wrong)."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{shown} --version: {error}"
    if done.returncode or not done.stdout.strip():
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return "", f"{shown} --version exited with {done.returncode}" + (f": {words[0]}" if words else "")
    return done.stdout.splitlines()[0].strip(), ""


def _ninja(family: str) -> str:
    """The ninja of its Python package, which works when the environment's bin is not on PATH, else PATH's."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.exists():
            return str(program)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError(family, "ninja is missing: pip install ninja")
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock of the kernel's own: it ends with the process that holds it, so none is ever stale."""
    try:
        import fcntl
    except ImportError as error:  # not a POSIX system
        raise BuildError(path.name, "building needs POSIX file locks, which this system has not") from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(out: Path) -> None:
    """Remove what killed builds left; we hold the lock, so no living build owns any of it."""
    for leftover in out.glob(f"{_WORK}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _compile(family: str, work: Path, using: Compiler) -> Path:
    cxx = f"{_escaped(shlex.join(using.command))} {' '.join(FLAGS)}"
    include = " ".join(f"-I{_escaped(shlex.quote(str(SOURCES / name)))}" for name in (family, COMMON))
    objects = {f"{source.stem}.o": _escaped(str(source)) for source in _sources(family)}
    lines = [
        "ninja_required_version = 1.5",
        "rule object",
        f"  command = {cxx} {include} -c $in -o $out",
        "rule library",
        f"  command = {cxx} $in -o $out",
        *(f"build {made}: object {source}" for made, source in objects.items()),
        f"build {library_name(family)}: library {' '.join(objects)}",
        "",
    ]
    (work / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run([_ninja(family), "-C", str(work)], capture_output=True, text=True, check=False)
    made = work / library_name(family)
    if done.returncode or not made.exists():
        log = (done.stdout + done.stderr).strip()
        raise BuildError(family, _first_error(log), log[-4000:])
    return made


def _escaped(text: str) -> str:
    """`text` as ninja reads it back: it gives $, space and colon a meaning."""
    return re.sub(r"([$ :])", r"$\1", text)


def _first_error(log: str) -> str:
    """The first line in which the compiler says what is wrong, else its first words at all."""
    own = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in own if not line.startswith(("ninja:", "FAILED:", "["))]
    for line in own:
        if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE) and " -o " not in line:
            return line
    said = [line for line in own if " -o " not in line]
    return said[0] if said else "the compiler failed without a word"
