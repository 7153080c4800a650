"""What one rank of the harness does: find the test by name, run it in a process group, write the result."""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import json
import operator
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

_PLAIN = (type(None), bool, int, float, str)
_SELF_DESTRUCT_S = 30.0  # past the timeout: only reached when the pytest process itself was killed


def encode(value: Any, name: str) -> Any:
    """A value as JSON that `decode` turns back into an equal one.

    Raises: TypeError naming the argument if it is none of the kinds that may cross to a rank.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [encode(item, name) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, name) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, name) for key, item in value.items()}}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if type(value).__name__ == "dtype" and str(value).startswith("torch."):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which cannot cross to another process; allowed are None, bool, "
        "int, float, str, a path, a torch dtype, and lists, tuples and dicts of these; build the rest inside "
        "the test"
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == "tuple":
        return tuple(decode(item) for item in inner)
    if kind == "dict":
        return {key: decode(item) for key, item in inner.items()}
    if kind == "path":
        return Path(inner)
    import torch

    return getattr(torch, inner)


def run_rank(call_json: str) -> None:
    """Entry of a rank process. Leaves `result-<rank>.json` in the call's folder, whatever the test does."""
    call = json.loads(call_json)
    folder, rank = Path(call["folder"]), call["rank"]
    os.setsid()  # so that ending a rank also ends what it started
    stacks = (folder / f"stacks-{rank}.txt").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    faulthandler.dump_traceback_later(call["timeout"] + _SELF_DESTRUCT_S, exit=True, file=stacks)
    os.environ.clear()
    os.environ.update(call["environ"])
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The fork server inherited pytest's captured streams; this rank's go to its own file.
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    try:
        said: dict[str, Any] = {"value": encode(_call(call), f"the value that rank {rank} returned")}
    except BaseException as error:
        skip = _skip_reason(error)
        said = {"error": _format(error)} if skip is None else {"skip": skip}
    said["at"] = time.time()
    part = folder / f"result-{rank}.part"
    part.write_text(json.dumps(said))
    part.replace(folder / f"result-{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()


def _call(call: Mapping[str, Any]) -> Any:
    if "torch" not in sys.modules:
        raise RuntimeError(
            "the fork server has not preloaded torch: is ds_core importable from its PYTHONPATH?"
        )
    from ds_core.testing.preload import PROBLEM

    if PROBLEM:
        raise RuntimeError(f"fork server: {PROBLEM}")
    import torch
    import torch.distributed as dist

    from ds_core.ground.background import background_threads
    from ds_core.ground.mesh import leave_distributed

    rank, world = call["rank"], call["world"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= world:
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    else:  # nccl refuses two ranks on one GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fn = _find(call["file"], call["name"])
    kwargs = {name: decode(value) for name, value in call["kwargs"].items()}
    wanted = inspect.signature(fn).parameters
    kwargs.update({k: v for k, v in {"rank": rank, "world": world}.items() if k in wanted})
    store = dist.TCPStore("127.0.0.1", call["port"], is_master=False)  # type: ignore[attr-defined]
    with background_threads():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(call["folder"], store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=call["timeout"] + _SELF_DESTRUCT_S),
        )
    dist.barrier()  # a rank that leaves at once must not break a connection that another is still making
    value = fn(**kwargs)
    if dist.is_initialized():  # a test may have taken it down itself
        dist.barrier()
        leave_distributed()
    return value


def _find(file: str, name: str) -> Callable[..., Any]:
    """Load a test file by path (pytest's importlib mode leaves it unimportable by name), find a function."""
    module_name = f"ds_rank_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    fn: Callable[..., Any] = inspect.unwrap(operator.attrgetter(name)(module))
    return fn


def _skip_reason(error: BaseException) -> str | None:
    pytest = sys.modules.get("pytest")
    return str(error) if pytest is not None and isinstance(error, pytest.skip.Exception) else None


def _format(error: BaseException) -> str:
    """The traceback from the test's own frame on: the harness's frames say nothing."""
    frames = error.__traceback__
    while (
        frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frames)))
