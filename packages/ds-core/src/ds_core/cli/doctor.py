"""`ds report`: versions, devices, backends, memory and installed packages, as a bug report needs them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds_core.observe.host import GIB, read_memory, usable_cores

_SUITE = ("core", "kernels", "zero", "offload", "comm", "pipe", "moe", "inference", "compression", "chat")
_LIBRARIES = ("torch", "numpy", "pydantic", "safetensors", "rich", "transformers", "deepspeed")
_SETTINGS = ("DS_", "NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "MASTER_", "SLURM_JOB")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")

Table = Mapping[str, object]
Rows = Sequence[Mapping[str, object]]


def add_parser(subparsers: Any) -> None:
    """Add `report` to the command."""
    parser = subparsers.add_parser(
        "report",
        help="show versions, devices, and what is installed",
        description="Show what there is on this machine, as it should stand in a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.zip",
        help="write everything for a bug report to this new file: secrets are removed, nothing is replaced",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a configuration to put into the bundle")
    parser.add_argument(
        "--log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a log, of which the end goes in",
    )
    parser.add_argument("--lines", type=int, default=200, help="how many last lines of each log (200)")
    parser.set_defaults(func=show)


def show(args: argparse.Namespace) -> int:
    """Run `ds report`."""
    if args.bundle is None and (args.config or args.log):
        raise ValueError("--config and --log say what goes into a bundle: add --bundle FILE.zip")
    if args.lines < 1:
        raise ValueError(f"--lines {args.lines}: it must be at least 1")
    found = collect()
    if args.bundle is not None:
        return _bundle(found, args)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else render(found))
    return 0


def _bundle(found: Mapping[str, Table | Rows], args: argparse.Namespace) -> int:
    from ds_core.cli.bundle import write_bundle

    kept = {title: part for title, part in found.items() if title != "settings"}  # has its own, stricter file
    names = write_bundle(args.bundle, kept, render(kept), config=args.config, logs=args.log, lines=args.lines)
    sys.stdout.write(f"wrote {args.bundle} ({', '.join(names)}); look through it before you send it\n")
    return 0


def render(found: Mapping[str, Table | Rows]) -> str:
    """The report as text."""
    return "\n\n".join(_render(title, part) for title, part in found.items() if part) + "\n"


def collect() -> dict[str, Table | Rows]:
    """Everything the report shows, by section: a table of names and values, or rows with columns.

    Other packages add sections through entry point group `ds.report`: a function without arguments that
    returns rows, as mappings or named tuples.
    """
    sections: dict[str, Table | Rows] = {
        "packages": {f"ds-{room}": found for room in _SUITE if (found := _package(room))},
        "versions": _versions(),
        "devices": _devices(),
        "host": _host(),
        "settings": _settings(os.environ),
    }
    for entry in sorted(entry_points(group="ds.report"), key=lambda e: e.name):
        sections[entry.name] = _contributed(entry.load)
    return sections


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(room: str) -> str | None:
    return _version(f"ds-{room}") or ("from a source tree" if find_spec(f"ds_{room}") else None)


def _versions() -> Table:
    import torch

    found: dict[str, object] = {"python": platform.python_version()}
    found |= {name: here for name in _LIBRARIES if (here := _version(name))}
    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found["torch built for"] = next((f"{kind} {v}" for kind, v in built_for.items() if v), "CPU")
    compilers = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    found["compiler"] = next(filter(None, compilers), "none")
    system = (platform.system(), platform.release(), platform.machine(), *platform.libc_ver())
    return found | {"system": " ".join(system)}


def _devices() -> Table:
    import torch
    import torch.distributed as dist

    backends = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    there = [name for name, available in backends.items() if dist.is_available() and available()]
    found: dict[str, object] = {"backends": ", ".join(there) or "none"}
    if not torch.accelerator.is_available():
        return {"accelerator": "none: the CPU is used", **found}
    found = {"accelerator": str(torch.accelerator.current_accelerator()), **found}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = device.total_memory / GIB, f"{device.major}.{device.minor}"
        found[f"device {index}"] = f"{device.name}, {memory:.0f} GiB, capability {capability}"
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _host() -> Table:
    cpu = _cpu_info()
    found: dict[str, object] = {
        "CPU": cpu.get("model name", platform.processor() or "unknown"),
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
        "SIMD": ", ".join(name for name in _SIMD if name in cpu.get("flags", "").split()) or "none known",
    }
    if memory := read_memory():
        found["memory"] = f"{(memory.total - memory.used) / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    for name in ("/dev/shm", "."):
        if Path(name).exists():
            disk = shutil.disk_usage(name)
            place = "working directory" if name == "." else name
            found[place] = f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free"
    return found


def _cpu_info() -> dict[str, str]:
    """The first processor's entries; ARM calls its flags features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    return found | {"flags": found.get("flags") or found.get("Features", "")}


def _settings(environ: Mapping[str, str]) -> Table:
    """Variables that change how training runs; those that may hold a secret only by name."""
    return {
        name: "(set, not shown)" if any(word in name.upper() for word in _SECRET) else value
        for name, value in sorted(environ.items())
        if name.startswith(_SETTINGS)
    }


def _contributed(load: Callable[[], Callable[[], Iterable[Any]]]) -> Rows:
    """Another package's rows; its failure is a row too, as a report must not fail."""
    try:
        return [dict(row._asdict() if hasattr(row, "_asdict") else row) for row in load()()]
    except Exception as error:
        return [{"failed": f"{type(error).__name__}: {error}"}]


def _render(title: str, part: Table | Rows) -> str:
    if isinstance(part, Mapping):
        width = max(map(len, part))
        lines = [f"  {name.ljust(width)}  {value}" for name, value in part.items()]
    else:
        columns = list(dict.fromkeys(name for row in part for name in row))
        cells = [columns, *([str(row.get(name, "")) for name in columns] for row in part)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([title, *lines])
