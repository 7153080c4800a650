"""The `ds` command: one table of subcommands, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

# name -> (module with add_parser(subparsers), one line of help)
_COMMANDS = {
    "launch": ("ds_core.cli.launch", "start a training script on several processes"),
    "report": ("ds_core.cli.doctor", "show versions, devices, and what is installed"),
    "estimate": ("ds_core.cli.estimate", "compute the memory a model needs at each stage"),
    "config": ("ds_core.cli.config", "check a configuration and show what it means"),
    "checkpoint": ("ds_core.cli.checkpoint", "list, verify and export checkpoints"),
}
_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="ds", description="Train large models.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, (module, help_line) in _COMMANDS.items():
        if words[:1] == [name]:
            import_module(module).add_parser(subparsers)
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
