"""`ds checkpoint ls|verify|export`: look at checkpoints, prove them whole, hand the model to Hugging Face."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OK, DAMAGED, WRONG_REQUEST = 0, 1, 2


def add_parser(subparsers: Any) -> None:
    """Add `checkpoint` to the `ds` command; `func(arguments)` returns the exit code."""
    parser = subparsers.add_parser("checkpoint", help="list, verify and export checkpoints")
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="ls|verify|export")
    listing = commands.add_parser("ls", help="what is in a directory of checkpoints, or in one step")
    listing.set_defaults(func=_guard(_ls))
    verify = commands.add_parser(
        "verify",
        help="read every byte of every step (or one) and compare with its hashes; exit code 1 if not",
    )
    verify.set_defaults(func=_guard(_verify))
    export = commands.add_parser("export", help="write the model as a Hugging Face directory")
    export.set_defaults(func=_guard(_export))
    for each in (listing, verify, export):
        each.add_argument("directory", type=Path, help="the run's checkpoint directory, or one step-N in it")
        each.add_argument("--step", type=int, help="this step (default: all for verify, latest for export)")
        each.add_argument("--json", action="store_true", help="print JSON")
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--dtype", help="convert floating tensors, e.g. bfloat16 (default: as stored)")
    export.add_argument("--config", type=Path, help="a config.json to take along")
    export.add_argument("--max-shard-size", default="5GB", help="start a new file above this (default 5GB)")
    export.add_argument("--part", default="model", help="the part to export (default model)")


def _guard(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn what a user can fix into one line and an exit code."""

    def run(arguments: argparse.Namespace) -> int:
        from ds_core.state.checkpoint_index import DamagedCheckpoint

        try:
            return command(arguments)
        except DamagedCheckpoint as error:
            sys.stderr.write(f"ds checkpoint: damaged: {error}\n")
            return DAMAGED
        except (ValueError, LookupError, OSError) as error:
            text = error.args[0] if isinstance(error, LookupError) and error.args else error
            sys.stderr.write(f"ds checkpoint: {text}\n")
            return WRONG_REQUEST

    return run


def _step_dirs(directory: Path, step: int | None) -> list[Path]:
    """The step directories meant by DIRECTORY and --step, ascending."""
    from ds_core.state.checkpoint_commit import list_steps, step_name
    from ds_core.state.checkpoint_index import INDEX

    if not directory.is_dir():
        raise LookupError(f"{directory} is not a directory")
    if (directory / INDEX).is_file():
        return [directory]
    steps = list_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "no complete checkpoint" if step is None else f"no complete step {step}"
        raise LookupError(f"{wanted} in {directory}; steps there: {', '.join(map(str, steps)) or 'none'}")
    return [directory / step_name(each) for each in steps if step in (None, each)]


def _ls(arguments: argparse.Namespace) -> int:
    from ds_core.state.checkpoint_commit import latest_step
    from ds_core.state.checkpoint_index import INDEX, read_index

    steps = _step_dirs(arguments.directory, arguments.step)
    if len(steps) == 1 and (steps[0] == arguments.directory or arguments.step is not None):
        return _ls_step(steps[0], arguments.json)
    latest = latest_step(arguments.directory)
    rows: list[dict[str, Any]] = []
    for path in steps:
        index = read_index(path)
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / INDEX).stat().st_mtime))
        rows.append(
            {
                "step": index.step,
                "latest": index.step == latest,
                "written": written,
                "bytes": index.total_bytes,
                "files": len(index.files),
                "parts": {name: len(part.tensors) for name, part in index.parts.items()},
            }
        )
    if arguments.json:
        return _print_json(rows)
    lines = [
        (
            str(row["step"]) + (" <- latest" if row["latest"] else ""),
            row["written"],
            _size(row["bytes"]),
            str(row["files"]),
            ", ".join(f"{name} ({count})" for name, count in row["parts"].items()),
        )
        for row in rows
    ]
    return _print_table(("step", "written", "size", "files", "parts (tensors)"), lines)


def _ls_step(path: Path, as_json: bool) -> int:
    from ds_core.state.checkpoint_index import read_index

    index = read_index(path)
    tensors: list[dict[str, Any]] = [
        {
            "part": part_name,
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "boxes": len(tensor.boxes),
        }
        for part_name, part in index.parts.items()
        for name, tensor in part.tensors.items()
    ]
    values = {name: part.values for name, part in index.parts.items() if part.values}
    if as_json:
        found = {"step": index.step, "bytes": index.total_bytes, "user": index.user}
        return _print_json({**found, "values": values, "tensors": tensors})
    lines = [(t["part"], t["name"], t["dtype"], str(t["shape"]), str(t["boxes"])) for t in tensors]
    lines += [
        (part, name, "json", "", _short(value)) for part in values for name, value in values[part].items()
    ]
    return _print_table(("part", "name", "dtype", "shape", "boxes"), lines)


def _verify(arguments: argparse.Namespace) -> int:
    from ds_core.state.checkpoint_digest import check_file
    from ds_core.state.checkpoint_index import DamagedCheckpoint, read_index
    from ds_core.state.checkpoint_reader import check_entries

    results: list[dict[str, Any]] = []
    for path in _step_dirs(arguments.directory, arguments.step):
        start, faults, total = time.perf_counter(), [], 0
        try:
            index = read_index(path)
            total = index.total_bytes
            for name, record in sorted(index.files.items()):
                try:
                    check_file(path, name, record, strong=True)
                except DamagedCheckpoint as error:
                    faults.append(str(error))
            if not faults:
                check_entries(path, index)
        except DamagedCheckpoint as error:
            faults.append(str(error))
        seconds = round(time.perf_counter() - start, 3)
        results.append({"step": path.name, "ok": not faults, "bytes": total, "s": seconds, "faults": faults})
    if arguments.json:
        _print_json(results)
    else:
        lines = [
            (
                r["step"],
                "whole" if r["ok"] else "DAMAGED",
                _size(r["bytes"]),
                f"{r['s']} s",
                "\n".join(r["faults"]),
            )
            for r in results
        ]
        _print_table(("step", "state", "size", "took", "faults"), lines)
    return OK if all(result["ok"] for result in results) else DAMAGED


def _export(arguments: argparse.Namespace) -> int:
    from ds_core.state.checkpoint_commit import latest_step, step_name
    from ds_core.state.export import export_hf, parse_bytes, parse_dtype

    steps = _step_dirs(arguments.directory, arguments.step)
    latest = latest_step(arguments.directory) if len(steps) > 1 else None
    path = steps[-1] if latest is None else arguments.directory / step_name(latest)
    config = None if arguments.config is None else json.loads(arguments.config.read_text())
    files = export_hf(
        path,
        arguments.out,
        config=config,
        dtype=None if arguments.dtype is None else parse_dtype(arguments.dtype),
        max_shard_bytes=parse_bytes(arguments.max_shard_size),
        part=arguments.part,
    )
    found: list[dict[str, Any]] = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    if arguments.json:
        return _print_json({"from": str(path), "files": found})
    return _print_table((f"from {path}", "size"), [(f["file"], _size(f["bytes"])) for f in found])


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return OK


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, head), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    # A pipe has no width: never cut names there.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(table)
    return OK
