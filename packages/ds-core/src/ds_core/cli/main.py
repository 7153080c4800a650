"""The `ds` command: one table of subcommands, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

# name -> (module with add_parser(subparsers), one line of help)
_COMMANDS = {
    "launch": ("ds_core.cli.launch", "start a training script on several processes"),
    "report": ("ds_core.cli.doctor", "show versions, devices, and what is installed"),
    "estimate": ("ds_core.cli.estimate", "compute the memory a model needs at each stage"),
    "config": ("ds_core.cli.config", "check a configuration and show what it means"),
    "checkpoint": ("ds_core.cli.checkpoint", "list, verify and export checkpoints"),
}
# What other packages add through entry point group `ds.command`: name -> (package, one line of help). The
# line stands here so that the list of commands imports none of them; a test of the package compares it.
_ELSEWHERE = {
    "comm": ("ds-comm", "measure the collectives between ranks"),
    "io": ("ds-offload", "measure a disk, and find the best settings for it"),
}
_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="ds", description="Train large models.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    plugins = _plugins()
    for name, help_line in _lines(plugins).items():
        if words[:1] == [name]:
            adder = _adder(name, plugins)
            if adder is None:
                package = _ELSEWHERE[name][0]
                sys.stderr.write(f"ds {name} comes with {package}: pip install {package}\n")
                return _USER_ERROR
            adder(subparsers)
        else:  # in the list of commands, without the cost of importing it
            subparsers.add_parser(name, help=help_line, add_help=False)
    args = parser.parse_args(words)
    if args.version:
        from ds_core import __version__

        sys.stdout.write(f"ds-core {__version__}\n")
        return 0
    if args.command is None:
        parser.print_help()
        return _USER_ERROR
    return _run(args)


def _plugins() -> Mapping[str, EntryPoint]:
    """Commands of installed packages, by name; nobody replaces ours."""
    return {entry.name: entry for entry in entry_points(group="ds.command") if entry.name not in _COMMANDS}


def _lines(plugins: Mapping[str, EntryPoint]) -> dict[str, str]:
    """Every command and its line of help: ours, then those of packages, installed or known."""
    lines = {name: help_line for name, (_, help_line) in _COMMANDS.items()}
    for name, (package, help_line) in _ELSEWHERE.items():
        lines[name] = help_line if name in plugins else f"{help_line} (needs {package})"
    for name, entry in sorted(plugins.items()):
        lines.setdefault(name, f"from {entry.dist.name}" if entry.dist else f"from {entry.module}")
    return lines


def _adder(name: str, plugins: Mapping[str, EntryPoint]) -> Callable[[Any], object] | None:
    """The command's `add_parser`, imported now; None if its package is not installed."""
    if name in _COMMANDS:
        found: Callable[[Any], object] = import_module(_COMMANDS[name][0]).add_parser
        return found
    return plugins[name].load() if name in plugins else None


def _run(args: argparse.Namespace) -> int:
    """Errors a user can cause become one line; DS_DEBUG=1 shows where they come from."""
    try:
        return int(args.func(args) or 0)
    except (ValueError, LookupError, OSError) as error:
        if os.environ.get("DS_DEBUG"):
            raise
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.stderr.write(f"ds {args.command}: {said}\n")
        return _USER_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
