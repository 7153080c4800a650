"""What `netns.py` will do, as data: rates, links, the commands that make a network, what ranks are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PREFIX = "ds-net"
INTERFACE = "ds0"
SUBNET = "10.77.0"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}  # bits of CapEff in /proc/self/status
_QUEUE_MS = 50  # what may wait in front of a link, as in a switch with shallow buffers


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
