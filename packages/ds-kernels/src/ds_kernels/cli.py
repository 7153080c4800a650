"""The `ds-kernels` command: compile ahead of time, check what is here, or say what is in use and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_kernels import build as driver


def main(argv: Sequence[str] | None = None) -> int:
    """The `ds-kernels` command."""
    parser = argparse.ArgumentParser(
        prog="ds-kernels", description="Compile the kernels ahead, check them, or say what is in use."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ahead = commands.add_parser("build", help="compile now instead of on first use")
    ahead.add_argument("families", nargs="*", help=f"any of: {', '.join(driver.families())} (default: all)")
    ahead.add_argument(
        "--out", type=Path, help="folder for the libraries (default: the cache that loading looks in)"
    )
    commands.add_parser("info", help="sources, cache, compiler, and which implementation each op gets")
    check = commands.add_parser("check", help="compare every implementation here with its reference")
    check.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    cubins = commands.add_parser("cubins", help="compile the Triton kernels for GPUs that need not be here")
    for command in (check, cubins):
        command.add_argument("families", nargs="*", help="default: all")
    args = parser.parse_args(argv)
    if args.command == "info":
        return _info()
    if args.command == "check":
        return _check(args.device, args.families)
    if args.command == "cubins":
        return _cubins(args.families)
    for family in args.families or driver.families():
        try:
            using = driver.compiler(family)
            print(driver.build(family, args.out or driver.cached_path(family, using).parent, using))
        except driver.BuildError as error:
            print(error)
            return 1
    return 0


def _info() -> int:
    from ds_kernels.table import report  # torch, which `build` does without

    print(f"sources   {driver.SOURCES.resolve()}")
    print(f"cache     {driver.cache_root()}")
    try:
        print(f"compiler  {driver.compiler('any').version}")
    except driver.BuildError as error:
        print(f"compiler  none: {error.reason}")
    cells = [("", "op", "device", "implementation", "why")]
    cells += [("*" if r.used else "", r.op, r.device, r.implementation, r.why) for r in report()]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    for row in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    print("* is what runs")
    return 0


def _check(device: str, families: Sequence[str]) -> int:
    import torch

    from ds_kernels.conformance.compare import cases, disagreements
    from ds_kernels.registry import FAMILIES

    found = 0
    for case in cases(torch.device(device), families or tuple(FAMILIES)):
        wrong = list(disagreements(case))
        print(f"{'differs' if wrong else 'agrees '}  {case.kernel.name}, {case.name}", *wrong, sep="\n  ")
        found += len(wrong)
    return int(found > 0)


def _cubins(families: Sequence[str]) -> int:
    from ds_kernels.cubins import compile_all
    from ds_kernels.registry import interpreting

    if interpreting():
        print("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
        return 1
    for made in compile_all(only=families):
        print(
            f"sm_{made.architecture:<4} {made.registers:4} registers {made.spilled_bytes:5} B spilled "
            f"{made.shared_bytes:7} B shared {made.size:8} B  {made.variant}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
