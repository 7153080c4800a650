"""Run by a package's own environment: import it after torch, and write down what that did to the process."""

import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import sys
import threading
import time
from pathlib import Path

import torch

# Not for importing on its own: modules of the fork server, and kernel sources written for a compiler.
SKIPPED = (".testing", ".sources", "__main__")


def state() -> dict[str, object]:
    tasks = sorted(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else []
    children = [c for t in tasks for c in Path(f"/proc/self/task/{t}/children").read_text().split()]
    return {"tasks": len(tasks), "threads": threading.active_count(), "children": children}


def brought_by_extras(package: str) -> set[str]:
    """What only an extra of the package brings, by the name it is imported under."""
    try:
        texts = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in texts if "extra ==" in text}


def load(name: str, extras: set[str]) -> None:
    """Import a module; recipes and bridges may need what an extra brings, and is not here."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        optional = {"recipes", "bridges"} & set(name.split("."))
        if not optional or (error.name or "").split(".")[0] not in extras:
            raise


MARK = "-- torch is imported --"  # what torch prints is torch's: it warns where numpy is not installed


def main(package: str, what: str, result: str) -> None:
    print(MARK, flush=True)
    print(MARK, file=sys.stderr, flush=True)
    before = state()
    start = time.perf_counter()
    module = importlib.import_module(package)
    seconds = time.perf_counter() - start
    names = [package]
    if what == "modules":
        found = pkgutil.walk_packages(module.__path__, f"{package}.")
        names = [m.name for m in found if not any(s in m.name for s in SKIPPED)]
        for name in names:
            load(name, brought_by_extras(package))
    seen = {
        "seconds": seconds,
        "names": names,
        "before": before,
        "after": state(),
        "cuda": torch.cuda.is_initialized(),
        "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }
    Path(result).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
