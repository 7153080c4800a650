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
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

PREFIX = "ds-net"
INTERFACE = "ds0"
SUBNET = "10.77.0"
PORT = 29500
UNAVAILABLE = 3  # the exit status of `Unavailable`

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}  # bits of CapEff in /proc/self/status
_QUEUE_MS = 50  # what may wait in front of a link, as in a switch with shallow buffers
_POLL_S = 0.02
_GRACE_S = 5.0  # between SIGTERM and SIGKILL


class Unavailable(RuntimeError):
    """This machine, or this user of it, cannot make such a network; the message says what is missing."""


# -- plans: pure ---------------------------------------------------------------------------------------------


def parse_rate(text: str) -> int:
    """Bits per second from tc's notation ("100mbit", "2.5gbit"). Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(
            f"a rate is a number above 0 and bit, kbit, mbit or gbit, such as 100mbit; got {text!r}"
        )
    return round(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class Link:
    """What one end of a link lets through: `rate_bits` per second, and `delay_ms` later."""

    rate_bits: int
    delay_ms: float = 0.0

    @property
    def burst_bytes(self) -> int:
        """What may leave at once after silence: a millisecond's worth, so that small messages see the rate.

        Above 2 Gbit/s less: 256 KiB hold several of the kernel's 64 KiB packets and hide its timer's slack.
        """
        return min(max(self.rate_bits // 8 // 1000, 8 << 10), 256 << 10)

    def commands(self, namespace: str, device: str) -> list[list[str]]:
        """Limit what `device` sends."""
        add = ["tc", "-n", namespace, "qdisc", "add", "dev", device]
        limit = [
            "tbf",
            "rate",
            f"{self.rate_bits}bit",
            "burst",
            str(self.burst_bytes),
            "latency",
            f"{_QUEUE_MS}ms",
        ]
        if not self.delay_ms:
            return [[*add, "root", *limit]]
        delay = ["netem", "delay", f"{self.delay_ms}ms", "limit", "1000000"]
        return [[*add, "root", "handle", "1:", *delay], [*add, "parent", "1:", "handle", "2:", *limit]]


def namespace_names(owner: int, nodes: int) -> list[str]:
    """One for each node, and one more for the switch where there are more than two."""
    names = [f"{PREFIX}-{owner}-{node}" for node in range(nodes)]
    return names if nodes == 2 else [*names, f"{PREFIX}-{owner}-switch"]


def address(node: int) -> str:
    return f"{SUBNET}.{node + 1}"


def plan_network(owner: int, nodes: int, link: Link) -> list[list[str]]:
    """The commands that make the network: two nodes face each other, more meet in a bridge.

    Nothing is made outside of the namespaces, so deleting these leaves nothing behind. Raises ValueError.
    """
    if not 2 <= nodes <= 200:
        raise ValueError(f"a network joins 2 to 200 nodes, got {nodes}")
    names = namespace_names(owner, nodes)
    commands = [["ip", "netns", "add", name] for name in names]
    if nodes == 2:
        pair = ["type", "veth", "peer", "name", INTERFACE, "netns", names[1]]
        commands.append(["ip", "-n", names[0], "link", "add", INTERFACE, *pair])
    else:
        switch = names[-1]
        commands.append(["ip", "-n", switch, "link", "add", "switch", "type", "bridge"])
        commands.append(["ip", "-n", switch, "link", "set", "switch", "up"])
        for node in range(nodes):
            port = f"port{node}"
            pair = ["type", "veth", "peer", "name", port, "netns", switch]
            commands.append(["ip", "-n", names[node], "link", "add", INTERFACE, *pair])
            commands.append(["ip", "-n", switch, "link", "set", port, "master", "switch", "up"])
            commands += link.commands(switch, port)
    for node in range(nodes):
        inside = ["ip", "-n", names[node]]
        commands.append([*inside, "addr", "add", f"{address(node)}/24", "dev", INTERFACE])
        commands.append([*inside, "link", "set", "lo", "up"])
        commands.append([*inside, "link", "set", INTERFACE, "up"])
        commands += link.commands(names[node], INTERFACE)
    return commands


def plan_environment(rank: int, ranks: int, per_node: int, port: int) -> dict[str, str]:
    """What one rank finds in its environment besides what is there already."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(rank // per_node),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }


def plan_leftovers(listed: str, alive: Callable[[int], bool]) -> list[str]:
    """Our namespaces in the output of `ip netns list` whose maker is gone."""
    found = []
    for line in listed.splitlines():
        match = re.match(rf"({PREFIX}-(\d+)-\w+)(\s|$)", line)
        if match is not None and not alive(int(match[2])):
            found.append(match[1])
    return found


def missing(uid: int, capabilities: int, which: Callable[[str], str | None]) -> str:
    """What keeps this process from making a network, in one sentence; empty if nothing is known to."""
    for tool in ("ip", "tc"):
        if which(tool) is None:
            return f"`{tool}` is not on PATH: install iproute2"
    if uid != 0:
        return f"network namespaces need root, and this is user {uid}: run it with sudo"
    lacking = [name for bit, name in _CAPABILITIES.items() if not capabilities >> bit & 1]
    if lacking:
        return f"root lacks {' and '.join(lacking)} here (a container?): start the container with them"
    return ""


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
        me = [sys.executable, "-I", str(Path(__file__).resolve())]
        port = str(PORT - 1)
        receive = self.inside(0, [*me, "--stream", "receive", address(0), port, "0"])
        send = self.inside(1, [*me, "--stream", "send", address(0), port, str(nbytes)])
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


# -- the stream that measures, in processes of its own -------------------------------------------------------


def stream(role: str, host: str, port: int, nbytes: int) -> None:
    """One end of a TCP stream; the receiver prints what it saw as JSON."""
    if role == "send":
        with _connect(host, port) as peer:
            for _ in range(20):
                peer.sendall(b"?")
                peer.recv(1)
            block = bytes(1 << 20)
            while nbytes > 0:
                peer.sendall(block[: min(nbytes, len(block))])
                nbytes -= len(block)
        return
    with socket.create_server((host, port)) as server:
        peer, _ = server.accept()
    with peer:
        trips, room = [], bytearray(1 << 20)
        for number in range(20):
            began = time.perf_counter()
            peer.recv(1)
            if number:  # from our answer to the next question
                trips.append(time.perf_counter() - began)
            peer.sendall(b"!")
        peer.recv_into(room)  # the clock starts with the first bytes, which a burst let through
        began, total = time.perf_counter(), 0
        while got := peer.recv_into(room):
            total += got
        spent = time.perf_counter() - began
    print(json.dumps({"bytes": total, "seconds": spent, "round_trip": statistics.median(trips)}))


def _connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((host, port), timeout=30)
        except ConnectionRefusedError:  # the receiver is still starting
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


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
    text.add_argument("--stream", nargs=4, help=argparse.SUPPRESS)
    text.add_argument("command", nargs=argparse.REMAINDER, help="-- and what every rank runs")
    return text


def print_line(rank: int, line: str) -> None:
    sys.stdout.write(f"[rank {rank}] {line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    if args.stream:
        role, host, port, nbytes = args.stream
        stream(role, host, int(port), int(nbytes))
        return 0
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        options.error("say after -- what every rank runs, such as: -- python train.py")
    if args.per_node < 1 or args.ranks % args.per_node:
        options.error(f"--ranks {args.ranks} must be a multiple of --per-node {args.per_node}")
    if args.delay_ms < 0:
        options.error(f"--delay-ms must be 0 or more, got {args.delay_ms:g}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
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


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
