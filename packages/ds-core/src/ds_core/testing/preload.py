"""Imported once by the fork server of the rank harness: everything slow that a rank may import later.

The one module here that does work when imported: that is its purpose, and only the fork server imports it.
Nothing it imports may start a thread, since a forked rank would lack it; `PROBLEM` says if something did.
"""

from __future__ import annotations

import gc
import importlib
import os

_SLOW = (
    "numpy",
    "pytest",
    "pydantic",
    "safetensors.torch",
    "torch",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "torch.nn.parallel",
    "torch.optim",
    "torch.testing",
    "torch.utils.checkpoint",
    "torch._dynamo",  # first optimizer step, first DDP
    "sympy",
    "torch.fx.experimental.symbolic_shapes",  # first assert_close
)


def _import_all(names: tuple[str, ...]) -> str:
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    # pytest and what DS_TEST_PRELOAD names may be absent; a rank that needs them says so itself.
    return f"could not preload {', '.join(missing)}" if "torch" in {m.split()[0] for m in missing} else ""


def _count_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:  # no /proc: not Linux
        return 1


PROBLEM = _import_all(_SLOW + tuple(os.environ.get("DS_TEST_PRELOAD", "").split()))
if not PROBLEM and _count_threads() > 1:
    PROBLEM = f"preloading started {_count_threads() - 1} threads, which a forked rank would lack"
# What is here stays: a rank that collects garbage need not look at it, which would also copy all its pages.
gc.collect()
gc.freeze()
