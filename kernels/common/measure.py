"""Times contenders in interleaved rounds, against a copy of as many bytes; for the benches of families.

A round runs every contender once, so that what else the machine does disturbs all alike. A line of JSON for
each table goes to the family's results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

_TRIM, _MMAP = -1, -3  # of mallopt(3)


@dataclass
class Bench:
    """One run of a family's bench: its settings, and where its lines go."""

    family: str
    rounds: int
    threads: int
    write: bool
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_command_line(cls, family: str, rounds: int = 15) -> Bench:
        """--rounds, --threads and --dry of the command; a process that keeps the memory it frees.

        With the allocator's defaults every large result is mapped anew, and page faults hide the arithmetic.
        """
        parser = argparse.ArgumentParser(description=f"Times family {family}; see its README.")
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--threads", type=int, default=os.cpu_count())
        parser.add_argument("--dry", action="store_true", help="write no results")
        args = parser.parse_args()
        if platform.system() == "Linux":
            allocator = ctypes.CDLL(None)
            for option in (_TRIM, _MMAP):
                allocator.mallopt(option, 1 << 30)
        torch.set_num_threads(args.threads)
        return cls(family, args.rounds, args.threads, not args.dry)

    def compare(
        self, case: str, contenders: Mapping[str, Callable[[], Any]], moved: int, **more: Any
    ) -> dict[str, float]:
        """Print and keep one table; returns the best milliseconds of each. `moved`: bytes that must move."""
        half = torch.ones(moved // 8)
        other = torch.zeros_like(half)
        every = {**contenders, f"copy of {moved / 1e6:.0f} MB": lambda: other.copy_(half)}
        taken: dict[str, list[float]] = {name: [] for name in every}
        for number in range(-2, self.rounds):
            for name, run in every.items():
                start = time.perf_counter()
                run()
                if number >= 0:
                    taken[name].append((time.perf_counter() - start) * 1e3)
        best = {name: min(times) for name, times in taken.items()}
        limit = list(best.values())[-1]
        print(f"\n{case}\n{'':34}{'median ms':>11}{'min ms':>9}{'GB/s':>8}{'of the copy':>13}")
        for name, times in taken.items():
            middle = statistics.median(times)
            share = f"{limit / best[name]:.0%}"
            print(f"{name:34}{middle:11.3f}{best[name]:9.3f}{moved / best[name] / 1e6:8.1f}{share:>13}")
        rows = {
            name: {"median_ms": round(statistics.median(times), 4), "min_ms": round(best[name], 4)}
            for name, times in taken.items()
        }
        self.lines.append({"case": case, "moved_bytes": moved, "rows": rows, **more})
        return best

    def finish(self) -> None:
        """Write the lines, with what was measured on."""
        if not self.write:
            return
        folder = Path(__file__).resolve().parent.parent / self.family / "results"
        folder.mkdir(exist_ok=True)
        what = {
            "date": date.today().isoformat(),
            "cpu": _cpu(),
            "threads": self.threads,
            "rounds": self.rounds,
            "torch": torch.__version__,
            "load": round(os.getloadavg()[0], 2),
        }
        path = folder / f"{what['date']}.jsonl"
        path.write_text("".join(json.dumps({**what, **line}) + "\n" for line in self.lines))
        print(f"\nwritten: {path.name}")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
