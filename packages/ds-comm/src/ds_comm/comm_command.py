"""`ds comm bench`: latency and bandwidth of every collective, plain and coded, on real ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_parser(subparsers: Any) -> None:
    """Add `comm` to the `ds` command."""
    parser = subparsers.add_parser(
        "comm",
        help="measure the collectives between ranks",
        description="What training on several ranks needs to know of the wire between them.",
    )
    add = parser.add_subparsers(dest="what", metavar="what", required=True).add_parser
    bench = add(
        "bench",
        help="latency and bandwidth of collectives by size, dtype and codec",
        description="Time collectives as training issues them. Alone it starts ranks on this host; under"
        " `ds launch -m ds_core.cli.main comm bench` (or torchrun) it measures between the ranks of that job."
        " Bandwidths count bytes before coding, so a codec that pays shows more than the wire can do.",
        allow_abbrev=False,
    )
    bench.add_argument("--nproc", metavar="N", default="auto", help="ranks to start (auto: all GPUs, else 2)")
    names = {"type": _names, "metavar": "A,B"}
    bench.add_argument("--ops", **names, default="all_gather,reduce_scatter,all_reduce,all_to_all,broadcast")
    bench.add_argument("--sizes", type=_sizes, metavar="N,N", default="64K,1M,8M", help="bytes (64K,1M,8M)")
    bench.add_argument("--dtypes", **names, default="fp32", help="fp32, bf16, fp16 (fp32)")
    bench.add_argument("--codecs", **names, default="none,bf16", help="none, bf16, fp16, int8... (none,bf16)")
    bench.add_argument("--seconds", type=float, default=6.0, metavar="S", help="time for all of it (6)")
    bench.add_argument("--json", action="store_true", help="print one JSON list, and no table")
    parser.set_defaults(func=run)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of bytes, as 65536, 64K or 1M") from None


def run(args: argparse.Namespace) -> int:
    """Run `ds comm bench`: as a rank of a job, or start one."""
    from ds_comm.bench import plan_cases, results_as_json, run_cases

    cases = plan_cases(args.ops, args.sizes, args.dtypes, args.codecs)
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds {args.seconds:g}: allowed are numbers above 0, such as 6")
    if "RANK" not in os.environ:
        return _start_ranks(args)
    from ds_core.ground.mesh import Topology

    mesh = Topology().build()
    results = run_cases(mesh, cases, seconds=args.seconds)
    if mesh.rank("world") == 0:
        if args.json:
            sys.stdout.write(json.dumps(results_as_json(results), indent=1) + "\n")
        else:
            _show(results, str(mesh.accelerator.device))
    return 0


def _start_ranks(args: argparse.Namespace) -> int:
    """The same command on ranks of this host; rank 0's output is ours."""
    from ds_core.cli import main as cli

    again = ["comm", "bench", "--ops", ",".join(args.ops), "--dtypes", ",".join(args.dtypes)]
    again += ["--codecs", ",".join(args.codecs), "--sizes", ",".join(map(str, args.sizes))]
    again += ["--seconds", str(args.seconds), *(["--json"] if args.json else [])]
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="ds-comm-"))
        launch = ["launch", "--nproc", args.nproc, "--logs", logs, "-m", "ds_core.cli.main"]
        return cli.main([*launch, *again])


def _show(results: Sequence[Any], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Collectives between {results[0].world} ranks on {device}, bytes before coding")
    for name in ("op", "dtype", "codec"):
        table.add_column(name, no_wrap=True)
    for name in ("ranks", "size", "sent by a rank", "runs", "ms", "best ms", "algbw GB/s", "busbw GB/s"):
        table.add_column(name, justify="right")
    before = ""
    for one in results:
        if before not in ("", one.case.op):
            table.add_section()
        before = one.case.op
        size, sent = (f"{count / 1e6:.3f} MB" for count in (one.case.num_bytes, one.sent_bytes))
        times = f"{one.median_ms:.3f}", f"{one.best_ms:.3f}"
        rates = f"{one.algbw / 1e9:.3f}", f"{one.busbw / 1e9:.3f}"
        cells = one.case.op, one.case.dtype, one.case.codec, str(one.world)
        table.add_row(*cells, size, sent, str(one.runs), *times, *rates)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
