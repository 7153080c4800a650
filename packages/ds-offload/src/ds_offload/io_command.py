"""`ds io bench`: finds the best settings for a disk, shows them beside fio's figures, and keeps them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
OPS = ("write", "read")
_SHOWN = 12  # rows of the table


def add_parser(subparsers: Any) -> None:
    """Add `io` to the `ds` command."""
    parser = subparsers.add_parser(
        "io",
        help="measure a disk, and find the best settings for it",
        description="What offloading to a disk needs to know of it.",
    )
    add = parser.add_subparsers(dest="what", metavar="what", required=True).add_parser
    bench = add(
        "bench",
        help="try queue depths, block sizes, threads and engines on a folder's disk",
        description="Try settings of ds-kernels' AsyncIO on a file in PATH, which has no name and so leaves"
        " nothing, and write the best to a JSON file: ds_offload.io_settings(file) loads it.",
        allow_abbrev=False,
    )
    bench.add_argument("path", metavar="PATH", help="a folder on the disk")
    bench.add_argument("--seconds", type=float, default=30.0, metavar="S", help="time for all of it (30)")
    bench.add_argument(
        "--bytes", type=parse_bytes, default=256 << 20, metavar="N", help="of the test file (256M)"
    )
    bench.add_argument("--out", metavar="FILE", help="where the settings go (default: PATH/ds_io.json)")
    sizes = {"type": _list_of(parse_bytes), "metavar": "N,N"}
    counts = {"type": _list_of(int), "metavar": "N,N"}
    bench.add_argument("--block-sizes", **sizes, help="bytes of a block (256K,1M,4M)")
    bench.add_argument("--queue-depths", **counts, help="blocks under way (8,32,64,128)")
    bench.add_argument("--threads", **counts, help="threads that submit (1,2,4)")
    bench.add_argument("--engines", type=_list_of(str), metavar="A,B", help="io_uring,libaio,threads,python")
    bench.add_argument("--json", action="store_true", help="print what is written, and no table")
    parser.set_defaults(func=run)


def parse_bytes(text: str) -> int:
    """`1048576`, `64K`, `1M`, `2G`."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of bytes, as 1048576, 64K, 1M or 2G") from None


def _list_of(kind: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "list"
    return parse


def run(args: argparse.Namespace) -> int:
    """Run `ds io bench`."""
    from ds_offload.io_bench import FILE, Sweep, bench_io, check_bench, write_settings

    chosen = {
        name: value
        for name in ("block_sizes", "queue_depths", "threads", "engines")
        if (value := getattr(args, name)) is not None
    }
    sweep = Sweep(**chosen)
    check_bench(args.path, args.seconds, args.bytes)
    out = Path(args.out) if args.out else Path(args.path, FILE)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it, or choose another")
    with _progress(quiet=args.json) as told:
        report = bench_io(args.path, seconds=args.seconds, num_bytes=args.bytes, sweep=sweep, told=told)
    write_settings(report, out)
    if args.json:
        sys.stdout.write(out.read_text(encoding="utf-8"))
        return 0
    _show(report, contend_fio(args.path, report.best.setting, args.bytes, args.seconds / 10))
    sys.stdout.write(f"wrote {out}: AsyncIO(**ds_offload.io_settings({str(out)!r}))\n")
    return 0


def _progress(*, quiet: bool) -> Any:
    """A bar on stderr while `told(share)` is called; nothing when quiet or where nobody looks."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        with ExitStack() as stack:
            console = Console(stderr=True)
            if quiet or not console.is_terminal:
                yield lambda share: None
                return
            columns = (TextColumn("trying settings"), BarColumn(), TimeElapsedColumn())
            shown = stack.enter_context(Progress(*columns, console=console, transient=True))
            task = shown.add_task("", total=1.0)
            yield lambda share: shown.update(task, completed=share)

    return bar()


def _show(report: Any, fio: Contender) -> None:
    from rich.console import Console
    from rich.table import Table

    best, path = report.best, report.folder
    how = "past the page cache" if report.direct else f"through the page cache: {report.why}"
    table = Table(title=f"{path}: {report.num_bytes / 2**20:.0f} MiB, {how}")
    for name in ("engine", "block KiB", "depth", "threads", "write GB/s", "read GB/s", "tries"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for result in report.results[:_SHOWN]:
        setting = result.setting
        cells = (setting.block_size // 1024, setting.queue_depth, setting.threads)
        rates = (f"{result.rate(op) / 1e9:.2f}" for op in OPS)
        style = "bold" if result is best else None
        tries = str(len(result.samples["read"]))
        table.add_row(setting.engine, *map(str, cells), *rates, tries, style=style)
    if fio.rates:
        rates = (f"{fio.rates[op] / 1e9:.2f}" for op in OPS)
        setting = best.setting
        cells = (setting.block_size // 1024, setting.queue_depth, setting.threads)
        table.add_section()
        table.add_row(f"fio {fio.engine}", *map(str, cells), *rates, "1", style="dim")
    Console(soft_wrap=True).print(table)
    more = len(report.results) - _SHOWN
    notes = [f"and {more} slower settings, in the file"] if more > 0 else []
    notes += [f"{len(report.skipped)} settings were not tried: give more --seconds"] if report.skipped else []
    notes += [f"no fio beside it: {fio.why}"] if fio.why else []
    sys.stdout.writelines(f"{note}\n" for note in notes)


@dataclass(frozen=True, slots=True)
class Contender:
    """fio's figures at the same settings, or why there are none."""

    engine: str = ""
    rates: dict[str, float] | None = None
    why: str = ""


def contend_fio(folder: str | os.PathLike[str], setting: Any, num_bytes: int, seconds: float) -> Contender:
    """Let fio do the same on a file that is open here: it has no name, so fio cannot leave it behind.

    In large pages, with which fio is as fast as it gets (kernels/aio/README.md).
    """
    from ds_offload.io_bench import bench_file

    program = shutil.which("fio")
    if program is None:
        return Contender(why="it is not installed")
    engine = setting.engine if setting.engine in ("io_uring", "libaio") else "psync"
    jobs = setting.queue_depth if engine == "psync" else setting.threads
    part = num_bytes // jobs // setting.block_size * setting.block_size
    if not part:
        return Contender(why=f"{num_bytes} bytes are less than a block for each of {jobs} jobs")
    with bench_file(folder, num_bytes) as (volume, extent, _):
        command = [
            *(program, "--name=ds", f"--filename=/proc/{os.getpid()}/fd/{volume.fd}"),
            *(f"--ioengine={engine}", f"--iodepth={max(1, setting.queue_depth // jobs)}", "--thread"),
            *(f"--bs={setting.block_size}", f"--direct={int(volume.file.direct)}", "--fallocate=none"),
            *(f"--numjobs={jobs}", f"--size={part}", f"--offset_increment={part}"),
            *(f"--offset={extent.offset}", "--time_based", f"--runtime={max(1, round(seconds))}"),
            "--output-format=json",
        ]
        try:
            return Contender(engine, {op: _fio_rate([*command, f"--rw={op}"], op, seconds) for op in OPS})
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            return Contender(why=f"it failed: {error}")


def _fio_rate(command: list[str], op: str, seconds: float) -> float:
    environ = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=10 * seconds + 60, env=environ)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(said[-1])
    jobs: list[Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    moved, longest_ms = sum(job[op]["io_bytes"] for job in jobs), max(job[op]["runtime"] for job in jobs)
    return float(moved / (longest_ms / 1e3))
