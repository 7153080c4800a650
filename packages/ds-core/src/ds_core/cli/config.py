"""`ds config resolve`: what a DeepSpeed file comes to, key by key, without a device or a second rank."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `config` to the `ds` command; `func(arguments)` returns the exit code."""
    parser = subparsers.add_parser("config", help="check a configuration and show what it means")
    commands = parser.add_subparsers(dest="config_command", required=True, metavar="resolve")
    resolve = commands.add_parser(
        "resolve",
        help="every key: its value, where it was written, where it acts",
        description="Reads a DeepSpeed JSON file as initialize() would on --world ranks. Errors name the"
        " key, what was given, what is allowed and where it was written.",
    )
    resolve.add_argument("file", type=Path, help="a DeepSpeed JSON file")
    resolve.add_argument("--world", type=int, default=1, help="number of ranks (default 1)")
    resolve.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key: zero_optimization.stage=3",
    )
    resolve.add_argument(
        "--auto",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='what stands for an "auto" in the file',
    )
    resolve.add_argument("--all", action="store_true", help="show keys that were left out too")
    resolve.add_argument("--json", action="store_true", help="print JSON")
    resolve.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved plan. Raises ValueError or OSError for what a user can mend."""
    from ds_core.ground.settings import Origin
    from ds_core.setup.config import Layer
    from ds_core.setup.deepspeed_json import explain, translate

    if arguments.world < 1:
        raise ValueError(f"--world is {arguments.world}; it must be at least 1")
    layers = [
        Layer(_nested(key, value), Origin("cli", f"--set {key}")) for key, value in _pairs(arguments.set)
    ]
    plan = translate(
        arguments.file,
        *layers,
        world=arguments.world,
        auto=dict(_pairs(arguments.auto)),
        world_origin=Origin("cli", "--world"),
    )
    rows = [row for row in explain(plan) if arguments.all or row.source.kind != "default"]
    if arguments.json:
        keys = [{"key": r.key, "value": r.value, "source": str(r.source), "acts": r.acts} for r in rows]
        content = plan.model_dump(mode="json", exclude={"keys"})
        sys.stdout.write(json.dumps({"plan": content, "keys": keys}, default=str) + "\n")
    else:
        _print_table(arguments, rows, plan.notices)
    return 0


def _print_table(arguments: argparse.Namespace, rows: list[Any], notices: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{arguments.file} on {arguments.world} ranks")
    for name in ("key", "value", "source", "where it acts"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (row.key, json.dumps(row.value, default=str), str(row.source), row.acts)
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table)
    for notice in notices:
        console.print(f"note: {notice}", markup=False)


def _pairs(texts: list[str]) -> list[tuple[str, Any]]:
    """KEY=VALUE, the value as JSON if it is some, else as text."""
    found = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"given {text!r}; allowed: KEY=VALUE, such as zero_optimization.stage=3")
        try:
            found.append((key, json.loads(value)))
        except json.JSONDecodeError:
            found.append((key, value))
    return found


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree
