"""`ds estimate`: the memory of a model's states per rank, at each stage."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

_STAGES = (0, 1, 2, 3)
_OPTIMIZERS = ("adamw", "adam", "lion", "adagrad", "momentum", "sgd")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_parser(subparsers: Any) -> None:
    """Add `estimate` to the `ds` command; `func(arguments)` returns the exit code."""
    parser = subparsers.add_parser(
        "estimate",
        help="compute the memory a model needs at each stage",
        description="Bytes of parameters, gradients and optimizer state per rank, after the ZeRO paper."
        " Activations come on top.",
    )
    parser.add_argument(
        "--params", required=True, type=parse_count, help="number of parameters: 7.5e9, 125M, 7.5B"
    )
    parser.add_argument("--ranks", type=parse_count, default=1, help="data-parallel ranks (default 1)")
    parser.add_argument("--stage", type=int, choices=_STAGES, help="only this stage (default: all)")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), default="bf16", help="of parameters (default bf16)"
    )
    parser.add_argument(
        "--grad-dtype", choices=sorted(_DTYPES), help="of kept gradients (default: that of the parameters)"
    )
    parser.add_argument(
        "--optimizer", choices=_OPTIMIZERS, default="adamw", help="which states it keeps (default adamw)"
    )
    parser.add_argument(
        "--largest-unit",
        type=parse_count,
        default=0,
        help="elements of the largest block, for working memory",
    )
    parser.add_argument(
        "--memory-gb", type=float, help="memory of one rank in GB; exit code 1 if it does not fit"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 when `--memory-gb` is given and no chosen stage fits."""
    from ds_core.setup.estimate import OPTIMIZER_STATES, Recipe, estimate_all

    grad = _DTYPES[arguments.grad_dtype] if arguments.grad_dtype else None
    recipe = Recipe(_DTYPES[arguments.dtype], grad, OPTIMIZER_STATES[arguments.optimizer])
    every = estimate_all(
        arguments.params, ranks=arguments.ranks, recipe=recipe, largest_unit=arguments.largest_unit
    )
    chosen = [each for each in every if arguments.stage in (None, each.stage)]
    available = None if arguments.memory_gb is None else arguments.memory_gb * 1e9
    if arguments.json:
        rows = [{**asdict(each), "states": each.states, "total": each.total} for each in chosen]
        sys.stdout.write(
            json.dumps({"params": arguments.params, "ranks": arguments.ranks, "stages": rows}) + "\n"
        )
    else:
        _print_table(arguments, chosen, available)
    return 0 if available is None or any(each.total <= available for each in chosen) else 1


def _print_table(arguments: argparse.Namespace, chosen: list[Any], available: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from ds_core.setup.estimate import gigabytes

    title = (
        f"{arguments.params:,} parameters, {arguments.dtype}, {arguments.optimizer}, {arguments.ranks} ranks"
    )
    table = Table(title=f"{title}: bytes per rank, without activations")
    for name in ("stage", "parameters", "gradients", "optimizer", "working", "total"):
        table.add_column(name, justify="right")
    if available is not None:
        table.add_column(f"fits {gigabytes(available)}")
    for each in chosen:
        parts = (each.params, each.grads, each.optimizer, each.working, each.total)
        fits = [] if available is None else ["yes" if each.total <= available else "no"]
        table.add_row(str(each.stage), *map(gigabytes, parts), *fits)
    Console().print(table)


def parse_count(text: str) -> int:
    """ "7.5e9", "7.5B" and "7500000000" are the same number."""
    digits, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 1)
    try:
        number = float(digits) * unit
    except ValueError:
        number = 0.0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number such as 125M, 7.5B or 7.5e9")
    return int(number)
