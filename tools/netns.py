"""Runs ranks on a slow network inside of this machine: network namespaces joined by veth, limited by `tc`.

    python tools/netns.py --ranks 2 --rate 100mbit -- python train.py --size 30m
    python tools/netns.py --ranks 4 --per-node 2 --rate 1gbit -- python train.py

Every node is a network namespace with one interface (`ds0`), which sends and receives at most `--rate`; ranks
of one node talk over its loopback. Ranks find RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT and GLOO_SOCKET_IFNAME in their environment. Linux, root, iproute2. Exit status: 0; 1 when a rank
failed or time was up; 2 for wrong arguments; 3 when this machine cannot make such a network, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from netns_plan import (
    Link,
    address,
    missing,
    namespace_names,
    parse_rate,
    plan_environment,
    plan_leftovers,
    plan_network,
)

STREAM = Path(__file__).resolve().with_name("netns_stream.py")
PORT = 29500
UNAVAILABLE = 3  # the exit status of `Unavailable`

_POLL_S = 0.02
_GRACE_S = 5.0  # between SIGTERM and SIGKILL


class Unavailable(RuntimeError):
    """This machine, or this user of it, cannot make such a network; the message says what is missing."""


# -- the network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """What the link does: payload bits per second of one TCP stream, and the round trip of one byte."""

    rate_bits: float
    round_trip_s: float

    def __str__(self) -> str:
        return (
            f"{self.rate_bits / 1e6:.1f} Mbit/s of TCP payload, round trip {self.round_trip_s * 1e3:.2f} ms"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the first to fail, or nothing; exit codes by rank (None: stopped by us)."""

    failure: str
    codes: tuple[int | None, ...]


class Network:
    """Nodes on links of one speed, from `with` to its end. What a killed run left is removed first.

    Raises: Unavailable (no root, no tools, a kernel without what is asked), ValueError (under two nodes).
    """

    def __init__(self, nodes: int, link: Link) -> None:
        self._commands = plan_network(os.getpid(), nodes, link)
        self._names = namespace_names(os.getpid(), nodes)
        self.nodes, self.link = nodes, link
        self._runs = 0

    def __enter__(self) -> Network:
        if reason := missing(os.geteuid(), effective_capabilities(), shutil.which):
            raise Unavailable(reason)
        remove_leftovers()
        try:
            for command in self._commands:
                _must(command)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            for name in set(self._names) & set(_listed().split()):
                remove(name)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def inside(self, node: int, command: Sequence[str]) -> list[str]:
        """`command` as the node runs it; the process started is the command itself."""
        return ["ip", "netns", "exec", self._names[node], *command]

    def run(
        self,
        command: Sequence[str],
        write: Callable[[int, str], object],
        *,
        per_node: int = 1,
        environ: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Run `command` as `per_node` ranks on every node; `write(rank, line)` gets what they print.

        The first rank to fail, and the end of the time, ends all. `environ`: None is this process's own.
        """
        self._runs += 1
        ranks = self.nodes * per_node
        base = os.environ if environ is None else environ
        running: list[subprocess.Popen[str]] = []
        readers: list[threading.Thread] = []
        try:
            for rank in range(ranks):
                mine = plan_environment(rank, ranks, per_node, PORT + self._runs % 1000)
                process = subprocess.Popen(
                    self.inside(rank // per_node, command),
                    env={**base, **mine},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                running.append(process)
                assert process.stdout is not None
                reader = threading.Thread(target=_forward, args=(process.stdout, rank, write), daemon=True)
                reader.start()
                readers.append(reader)
            return _watch(running, timeout_s)
        finally:
            _end(running)
            for reader in readers:
                reader.join(_GRACE_S)

    def measure(self) -> Measured:
        """Send through the link for about half a second, with nothing else on it."""
        nbytes = min(max(self.link.rate_bits // 16, 1 << 18), 1 << 29)
        me = [sys.executable, "-I", str(STREAM)]
        port = str(PORT - 1)
        receive = self.inside(0, [*me, "receive", address(0), port, "0"])
        send = self.inside(1, [*me, "send", address(0), port, str(nbytes)])
        with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
            try:
                _must(send)
                out, _ = receiver.communicate(timeout=60)
            finally:
                receiver.kill()
        told = json.loads(out)
        return Measured(8 * told["bytes"] / told["seconds"], told["round_trip"])


def effective_capabilities() -> int:
    """The bits of CapEff; all of them where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return -1


def remove_leftovers() -> None:
    """Delete the namespaces of runs that were killed, and end what still runs inside."""
    for name in plan_leftovers(_listed(), _alive):
        remove(name)


def remove(name: str) -> None:
    """Delete one namespace, and end what runs inside: the kernel keeps it for as long as anything does."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _listed() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout


def _must(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"`{' '.join(command)}` failed: {said[-1] if said else f'exit {done.returncode}'}")


def _forward(stream: IO[str], rank: int, write: Callable[[int, str], object]) -> None:
    for line in stream:
        write(rank, line.rstrip("\n"))


def _watch(running: Sequence[subprocess.Popen[str]], timeout_s: float | None) -> Outcome:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        codes = tuple(process.poll() for process in running)
        for rank, code in enumerate(codes):
            if code:
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return Outcome(f"rank {rank} ended with {how}; the others were stopped", codes)
        if all(code == 0 for code in codes):
            return Outcome("", codes)
        if deadline is not None and time.monotonic() > deadline:
            still = [rank for rank, code in enumerate(codes) if code is None]
            return Outcome(f"time was up after {timeout_s:g} s with ranks {still} still running", codes)
        time.sleep(_POLL_S)


def _end(running: Sequence[subprocess.Popen[str]]) -> None:
    """Stop every rank and what it started: asked first, then killed."""
    deadline = time.monotonic() + _GRACE_S
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # the leader may be gone and its children not
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


# -- the command ---------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    text.add_argument("--ranks", type=int, default=2)
    text.add_argument("--per-node", type=int, default=1, help="ranks that share one namespace")
    text.add_argument("--rate", default="100mbit", help="of each link: 100mbit, 1gbit, 10gbit")
    text.add_argument("--delay-ms", type=float, default=0.0, help="one way, by netem")
    text.add_argument("--timeout", type=float, help="seconds after which the ranks are stopped")
    text.add_argument("command", nargs=argparse.REMAINDER, help="-- and what every rank runs")
    return text


def print_line(rank: int, line: str) -> None:
    sys.stdout.write(f"[rank {rank}] {line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        options.error("say after -- what every rank runs, such as: -- python train.py")
    if args.per_node < 1 or args.ranks % args.per_node:
        options.error(f"--ranks {args.ranks} must be a multiple of --per-node {args.per_node}")
    if args.delay_ms < 0:
        options.error(f"--delay-ms must be 0 or more, got {args.delay_ms:g}")
    leave_on_signals()
    try:
        network = Network(args.ranks // args.per_node, Link(parse_rate(args.rate), args.delay_ms))
    except ValueError as error:
        options.error(str(error))
    try:
        with network:
            print(f"netns: {network.nodes} nodes at {args.rate}: {network.measure()}", flush=True)
            outcome = network.run(command, print_line, per_node=args.per_node, timeout_s=args.timeout)
    except Unavailable as reason:
        print(f"netns: no slow network here: {reason}", file=sys.stderr)
        return UNAVAILABLE
    if outcome.failure:
        print(f"netns: {outcome.failure}", file=sys.stderr)
    return 1 if outcome.failure else 0


def leave_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP unwind the main thread, so that a network's `with` ends."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


if __name__ == "__main__":
    sys.exit(main())
