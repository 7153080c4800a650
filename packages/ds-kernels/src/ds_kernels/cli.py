"""The `ds-kernels` command: compile ahead of time, or say what is in use and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_kernels import build as driver


def main(argv: Sequence[str] | None = None) -> int:
    """The `ds-kernels` command."""
    parser = argparse.ArgumentParser(
        prog="ds-kernels", description="Compile the kernels ahead, or say what is in use."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ahead = commands.add_parser("build", help="compile now instead of on first use")
    ahead.add_argument("families", nargs="*", help=f"any of: {', '.join(driver.families())} (default: all)")
    ahead.add_argument(
        "--out", type=Path, help="folder for the libraries (default: the cache that loading looks in)"
    )
    commands.add_parser("info", help="sources, cache, compiler, and which implementation each op gets")
    args = parser.parse_args(argv)
    if args.command == "info":
        return _info()
    for family in args.families or driver.families():
        try:
            using = driver.compiler(family)
            print(driver.build(family, args.out or driver.cached_path(family, using).parent, using))
        except driver.BuildError as error:
            print(error)
            return 1
    return 0


def _info() -> int:
    from ds_kernels.registry import report  # torch, which `build` does without

    print(f"sources   {driver.SOURCES.resolve()}")
    print(f"cache     {driver.cache_root()}")
    try:
        print(f"compiler  {driver.compiler('any').version}")
    except driver.BuildError as error:
        print(f"compiler  none: {error.reason}")
    rows = [("op", "device", "implementation", "why"), *report()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
