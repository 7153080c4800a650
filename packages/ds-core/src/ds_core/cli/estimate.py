"""`ds estimate`: the memory of a model per rank, at each stage, and the cheapest configuration that fits."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
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
        description="With --params: bytes of parameters, gradients and optimizer state per rank, after the"
        " ZeRO paper. With --model: what the runtime allocates, with buckets, gathered units, activations and"
        " loading. With --search: the cheapest configuration that fits.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--params", type=parse_count, help="number of parameters: 7.5e9, 125M, 7.5B")
    which.add_argument("--model", help="a Hugging Face config.json, or its folder")
    parser.add_argument("--ranks", type=parse_count, default=1, help="data-parallel ranks (default 1)")
    parser.add_argument("--stage", type=int, choices=_STAGES, help="only this stage (default: all)")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), default="bf16", help="of parameters (default bf16)"
    )
    parser.add_argument(
        "--grad-dtype",
        choices=sorted(_DTYPES),
        help="of kept gradients (default: the parameters', with --model fp32)",
    )
    parser.add_argument(
        "--optimizer", choices=_OPTIMIZERS, default="adamw", help="which states it keeps (default adamw)"
    )
    parser.add_argument(
        "--largest-unit", type=parse_count, default=0, help="with --params: elements of the largest block"
    )
    parser.add_argument(
        "--memory-gb", type=float, help="memory of one rank in GB; exit code 1 if it does not fit"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_model_options(parser.add_argument_group("with --model"))
    parser.set_defaults(func=run)


def _add_model_options(group: Any) -> None:
    group.add_argument("--seq", type=parse_count, help="tokens of a sequence; without it no activations")
    group.add_argument("--micro-batch", type=parse_count, default=1, help="sequences at a time (default 1)")
    group.add_argument("--accumulate", type=parse_count, default=1, help="micro batches per step (default 1)")
    group.add_argument("--recompute", action="store_true", help="activation checkpointing of every block")
    group.add_argument("--eager-attention", action="store_true", help="attention that writes its scores")
    group.add_argument("--built-whole", action="store_true", help="built on every rank, not on meta")
    for name in ("bucket", "prefetch", "keep", "persist"):
        group.add_argument(f"--{name}-numel", type=int, help=f"Zero's {name}_numel (default: its own)")
    group.add_argument("--search", action="store_true", help="find the cheapest configuration that fits")
    group.add_argument("--global-batch", type=parse_count, help="with --search: sequences per step")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 when `--memory-gb` is given and no chosen stage fits. Raises DoesNotFit."""
    if arguments.model is not None:
        return _search(arguments) if arguments.search else _model(arguments)
    if arguments.search:
        raise ValueError("--search looks at activations too: give --model, not --params")
    from ds_core.setup.estimate import OPTIMIZER_STATES, Recipe, estimate_all

    grad = _DTYPES[arguments.grad_dtype] if arguments.grad_dtype else None
    recipe = Recipe(_DTYPES[arguments.dtype], grad, OPTIMIZER_STATES[arguments.optimizer])
    every = estimate_all(
        arguments.params, ranks=arguments.ranks, recipe=recipe, largest_unit=arguments.largest_unit
    )
    chosen = [each for each in every if arguments.stage in (None, each.stage)]
    available = _available(arguments)
    if arguments.json:
        rows = [{**asdict(each), "states": each.states, "total": each.total} for each in chosen]
        _print_json({"params": arguments.params, "ranks": arguments.ranks, "stages": rows})
    else:
        title = f"{arguments.params:,} parameters, {_title(arguments)}: bytes per rank, without activations"
        names = ("parameters", "gradients", "optimizer", "working", "total")
        parts = [(e.params, e.grads, e.optimizer, e.working, e.total) for e in chosen]
        _print_table(title, names, [each.stage for each in chosen], parts, available)
    return 0 if available is None or any(each.total <= available for each in chosen) else 1


def _model(arguments: argparse.Namespace) -> int:
    from ds_core.setup.predict import predict

    shape, settings = _shape_and_settings(arguments)
    stages = [stage for stage in _STAGES if arguments.stage in (None, stage)]
    found = {stage: predict(shape, settings(stage)) for stage in stages}
    available = _available(arguments)
    if arguments.json:
        rows = [
            {"stage": stage, **asdict(memory), "total": memory.total, "peak": memory.peak}
            for stage, memory in found.items()
        ]
        _print_json({"params": shape.numel, "ranks": arguments.ranks, "stages": rows})
    else:
        title = f"{shape.numel:,} parameters, {_title(arguments)}: bytes per rank"
        title += "" if arguments.seq else ", without activations (give --seq)"
        names = ("parameters", "gradients", "optimizer", "buckets", "gathered", "activations", "step")
        parts = [(*m.parts().values(), m.total, m.loading, m.host) for m in found.values()]
        _print_table(title, (*names, "loading", "host"), stages, parts, available, column=6)
    return 0 if available is None or any(m.peak <= available for m in found.values()) else 1


def _search(arguments: argparse.Namespace) -> int:
    from ds_core.setup.search import search

    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("seq", "global_batch", "memory_gb")
        if not getattr(arguments, name)
    ]
    if missing:
        raise ValueError(f"--search needs {' and '.join(missing)}")
    shape, settings = _shape_and_settings(arguments)
    found = search(
        shape,
        settings(arguments.stage or 0),
        global_batch=arguments.global_batch,
        available=arguments.memory_gb * 1e9,
    )
    if arguments.json:
        rows = [{**asdict(c), "name": c.name, "total": c.memory.total} for c in found]
        _print_json({"params": shape.numel, "ranks": arguments.ranks, "candidates": rows})
        return 0
    _print_candidates(found, f"{shape.numel:,} parameters, {_title(arguments)}")
    return 0


def _shape_and_settings(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from ds_core.setup.estimate import OPTIMIZER_STATES
    from ds_core.setup.predict import Settings
    from ds_core.setup.shape import Shape

    budgets = {
        f"{name}_numel": getattr(arguments, f"{name}_numel") for name in ("prefetch", "keep", "persist")
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    bucket = arguments.bucket_numel or Settings().bucket_numel
    settings = Settings(
        ranks=arguments.ranks,
        dtype=_DTYPES[arguments.dtype],
        grad_dtype=_DTYPES[arguments.grad_dtype] if arguments.grad_dtype else None,
        states=OPTIMIZER_STATES[arguments.optimizer],
        micro_batch=arguments.micro_batch,
        accumulate=arguments.accumulate,
        seq=arguments.seq or 0,
        recompute=arguments.recompute,
        attention="eager" if arguments.eager_attention else "sdpa",
        bucket_numel=bucket,
        on_meta=not arguments.built_whole,
        **given,
    )
    shape = Shape.from_config(arguments.model, bucket_numel=bucket)
    return shape, lambda stage: replace(settings, stage=stage)


def _available(arguments: argparse.Namespace) -> float | None:
    return None if arguments.memory_gb is None else float(arguments.memory_gb) * 1e9


def _title(arguments: argparse.Namespace) -> str:
    return f"{arguments.dtype}, {arguments.optimizer}, {arguments.ranks} ranks"


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")


def _print_table(
    title: str, names: Any, stages: list[Any], rows: list[Any], available: float | None, *, column: int = -1
) -> None:
    """One line per stage; what fits is told from the given column and those after it."""
    from rich.console import Console
    from rich.table import Table

    from ds_core.train.memory import gigabytes

    table = Table(title=title)
    for name in ("stage", *names):
        table.add_column(name, justify="right")
    if available is not None:
        table.add_column(f"fits {gigabytes(available)}")
    for stage, parts in zip(stages, rows, strict=True):
        needed = max(parts[column : column + 2]) if column >= 0 else parts[-1]
        fits = [] if available is None else ["yes" if needed <= available else "no"]
        table.add_row(str(stage), *map(gigabytes, parts), *fits)
    Console().print(table)


def _print_candidates(found: list[Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ds_core.train.memory import gigabytes

    table = Table(title=f"{title}: cheapest first")
    for name in ("configuration", "memory", "wire per step", "model seconds", "verdict"):
        table.add_column(name, overflow="fold")
    for c in found:
        table.add_row(
            c.name, gigabytes(c.memory.peak), gigabytes(c.wire_bytes), f"{c.seconds:.3g}", c.verdict
        )
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
