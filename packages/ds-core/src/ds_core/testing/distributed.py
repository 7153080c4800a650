"""Run a test on several ranks: real processes, forked in a tenth of a second from a server that has torch.

A rank is a fresh process, in a process group of its own. Ranks find each other in a store that this process
keeps on the loopback, where gloo talks too, under a name of their own: tests share nothing. Only JSON
crosses: the test's file, its name and its arguments.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ds_core.observe.exits import describe_exit, lost_connection
from ds_core.testing.rank import decode, encode, run_rank

GRACE_S = 2.0  # how long the others may go on after the first failure: they may hang in a collective
_STACK_S = 1.0  # how long a stuck rank may take to write its stacks
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RankFailure(AssertionError):
    """At least one rank failed; the message starts with the first one to fail."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one rank ended. `at` is when it did, on the clock all ranks share; an empty `error` is success."""

    value: Any = None
    error: str = ""
    skip: str | None = None
    at: float = float("inf")


def distributed(
    world_size: int = 2, timeout: float = 60.0
) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Run the decorated pytest function on `world_size` ranks with a default process group.

    The function gets `rank` and `world` if it declares them; parameters and fixtures may be None, bool, int,
    float, str, paths, dtypes, and lists, tuples and dicts of these (`tmp_path` is, `monkeypatch` is not).
    Raises: RankFailure if any rank raises, dies or takes longer than `timeout` seconds.
    """

    def decorate(fn: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(fn)
        def wrapper(**kwargs: Any) -> None:
            run_ranks(fn, world_size, timeout=timeout, **kwargs)

        signature = inspect.signature(fn)
        shown = [p for name, p in signature.parameters.items() if name not in ("rank", "world")]
        wrapper.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def run_ranks(fn: Callable[..., object], world: int, *, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """Run a module-level function on `world` ranks and return what each returned (JSON values), by rank.

    Raises: RankFailure as `distributed` does; pytest's Skipped if a rank skips and none fails.
    """
    if "<" in fn.__qualname__:
        raise ValueError(
            f"{fn.__qualname__} is local: the ranks find a function by its file and name, so move it to the "
            "top level of the test file and pass what it needs as arguments"
        )
    server = _fork_server()
    with tempfile.TemporaryDirectory(prefix="ds-ranks-") as folder:
        call = {
            "file": str(Path(inspect.getfile(inspect.unwrap(fn))).resolve()),
            "name": fn.__qualname__,
            "kwargs": {
                name: encode(value, f"{fn.__qualname__}({name}=...)") for name, value in kwargs.items()
            },
            "world": world,
            "timeout": timeout,
            "folder": folder,
            "port": _store().port,
            "environ": {**os.environ, **_ONE_THREAD},
        }
        ranks = [
            server.Process(target=run_rank, args=(json.dumps({**call, "rank": rank}),), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in ranks:
                process.start()
            outcomes = _watch(ranks, Path(folder), timeout)
        finally:
            _end(ranks)
        _replay(Path(folder), world)
        return _judge(outcomes)


@functools.cache
def _store() -> Any:
    """Where ranks find each other, each call under its own prefix. A file store is asked every 10 ms only,
    which for a handful of groups is as much as a small test takes.
    """
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )


@functools.cache
def _fork_server() -> Any:
    """The fork server, started with this process's `sys.path` and single-threaded libraries.

    Python hands the server no `sys.path`, and the server silently ignores a preload module that it cannot
    import: each rank would then import torch by itself. What this process has of the suite, ranks need too:
    imported once in the server, it costs them nothing, where their own imports would take 0.1 s each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_core.testing.preload"])
    path = os.pathsep.join(dict.fromkeys(p for p in sys.path if p))
    suite = [name for name in sys.modules if name.startswith("ds_")]
    preload = " ".join([os.environ.get("DS_TEST_PRELOAD", ""), *suite])
    wanted = {**_ONE_THREAD, "PYTHONPATH": path, "DS_TEST_PRELOAD": preload}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _watch(ranks: list[Any], folder: Path, timeout: float) -> list[_Outcome]:
    """Wait for the ranks; once one fails the others have `GRACE_S` left."""
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    outcomes = [_Outcome()] * len(ranks)
    deadline = time.monotonic() + timeout
    limit = f"still running after {timeout:g} s"
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            rank = running.pop(sentinel)
            outcomes[rank] = _read_outcome(folder, rank, ranks[rank])
            if outcomes[rank].error and time.monotonic() + GRACE_S < deadline:
                deadline = time.monotonic() + GRACE_S
                limit = f"still running {GRACE_S:g} s after rank {rank} failed"
    for rank in running.values():
        outcomes[rank] = _Outcome(error=f"{limit}\n{_stacks(folder, rank, ranks[rank])}", at=time.time())
    return outcomes


def _read_outcome(folder: Path, rank: int, process: Any) -> _Outcome:
    result = folder / f"result-{rank}.json"
    process.join()
    if not result.exists():
        stacks = (folder / f"stacks-{rank}.txt").read_text() if process.exitcode else ""
        died = f"died before its test ended: {describe_exit(process.exitcode)}"
        return _Outcome(error=f"{died}\n{stacks}".rstrip(), at=time.time())
    said: Mapping[str, Any] = json.loads(result.read_text())
    return _Outcome(decode(said.get("value")), said.get("error", ""), said.get("skip"), said["at"])


def _stacks(folder: Path, rank: int, process: Any) -> str:
    """Ask a stuck rank for the stack of each of its threads."""
    file = folder / f"stacks-{rank}.txt"
    if not file.exists():
        return "(it had not started)"
    os.kill(process.pid, signal.SIGUSR1)
    end = time.monotonic() + _STACK_S
    while time.monotonic() < end and "File" not in file.read_text():
        time.sleep(0.02)
    time.sleep(0.02)
    return file.read_text() or "(it gave no stack)"


def _end(ranks: list[Any]) -> None:
    """Kill what still runs, with the processes it started."""
    for process in ranks:
        if process.pid is None or not process.is_alive():
            continue
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its own group yet
            process.kill()
        process.join()


def _replay(folder: Path, world: int) -> None:
    """Give the ranks' output to this process's stdout, where pytest keeps it with the test."""
    for rank in range(world):
        file = folder / f"output-{rank}.txt"
        text = file.read_text(errors="replace") if file.exists() else ""
        for line in text.splitlines():
            sys.stdout.write(f"[rank {rank}] {line}\n")


def _judge(outcomes: list[_Outcome]) -> list[Any]:
    # A rank that lost its peer often says so before the peer's death is noticed.
    failed = sorted((lost_connection(o.error), o.at, rank) for rank, o in enumerate(outcomes) if o.error)
    if failed:
        raise RankFailure("\n".join(_report(rank, outcomes[rank]) for *_, rank in failed))
    skipped = [o.skip for o in outcomes if o.skip is not None]
    if skipped:
        import pytest

        pytest.skip(skipped[0])
    return [o.value for o in outcomes]


def _report(rank: int, outcome: _Outcome) -> str:
    """`[rank 1] ValueError: the last line` as pytest's summary shows it, then the whole traceback."""
    lines = outcome.error.rstrip().splitlines()
    verdict = lines[0]
    if verdict.startswith("Traceback"):
        at = max((i for i, line in enumerate(lines) if line.startswith("  ")), default=0)
        verdict = next((line for line in lines[at + 1 :] if line.strip()), lines[-1])
        return "\n".join([f"[rank {rank}] {verdict}", *(f"[rank {rank}]   {line}" for line in lines)])
    return "\n".join([f"[rank {rank}] {verdict}", *(f"[rank {rank}]   {line}" for line in lines[1:])])
