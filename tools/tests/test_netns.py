"""netns: what it would do, what it says when it cannot, and how it takes wrong arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

import netns
import netns_plan
from netns_plan import Link

TOOL = Path(netns.__file__)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100mbit", 10**8), ("1gbit", 10**9), (" 2.5Gbit ", 2_500_000_000), ("56kbit", 56_000), ("9bit", 9)],
)
def test_rates_are_those_of_tc(text: str, bits: int):
    assert netns_plan.parse_rate(text) == bits


@pytest.mark.parametrize("text", ["100", "100mb", "0mbit", "-1mbit", "fast", "1 gbit", "100mbps", ""])
def test_other_rates_are_refused(text: str):
    with pytest.raises(ValueError, match="such as 100mbit; got"):
        netns_plan.parse_rate(text)


def test_a_burst_is_a_millisecond_within_bounds():
    bursts = {
        rate: Link(netns_plan.parse_rate(rate)).burst_bytes
        for rate in ("1mbit", "100mbit", "1gbit", "10gbit")
    }
    assert bursts == {"1mbit": 8192, "100mbit": 12_500, "1gbit": 125_000, "10gbit": 262_144}


def limited(commands: list[list[str]]) -> set[tuple[str, str]]:
    """(namespace, device) of everything whose sending is limited."""
    return {(c[2], c[6]) for c in commands if c[0] == "tc" and "tbf" in c}


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_every_end_is_limited_and_nothing_is_made_outside_of_the_namespaces(nodes: int):
    commands = netns_plan.plan_network(77, nodes, Link(10**8))
    made = [c[3] for c in commands if c[:3] == ["ip", "netns", "add"]]
    assert made == netns_plan.namespace_names(77, nodes)
    ends = {(f"ds-net-77-{node}", "ds0") for node in range(nodes)}
    if nodes > 2:  # a node receives no faster than it sends: the switch's ports are limited too
        ends |= {("ds-net-77-switch", f"port{node}") for node in range(nodes)}
    assert limited(commands) == ends
    for command in commands[len(made) :]:
        assert command[1] == "-n", command
        assert command[2] in made, command
        assert command.count("netns") == command.count("veth"), command  # the other end is inside one too
    assert all("12500" in c for c in commands if "tbf" in c)


def test_addresses_differ_and_the_first_is_the_master():
    commands = netns_plan.plan_network(77, 4, Link(10**9))
    given = [c[c.index("add") + 1] for c in commands if "addr" in c]
    assert given == [f"{netns_plan.address(node)}/24" for node in range(4)]
    assert len(set(given)) == 4
    assert netns_plan.plan_environment(3, 4, 1, 1)["MASTER_ADDR"] == netns_plan.address(0)


def test_a_delay_comes_before_the_limit():
    first, second = Link(10**8, delay_ms=2.5).commands("ns", "ds0")
    assert first[first.index("root") :] == [
        "root",
        "handle",
        "1:",
        "netem",
        "delay",
        "2.5ms",
        "limit",
        "1000000",
    ]
    assert second[second.index("parent") : second.index("tbf")] == ["parent", "1:", "handle", "2:"]


@pytest.mark.parametrize("nodes", [0, 1, 201])
def test_other_numbers_of_nodes_are_refused(nodes: int):
    with pytest.raises(ValueError, match=f"2 to 200 nodes, got {nodes}"):
        netns_plan.plan_network(1, nodes, Link(1000))


def test_ranks_of_a_node_know_it():
    found = [netns_plan.plan_environment(rank, 4, 2, 29501) for rank in range(4)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["GROUP_RANK"]) for e in found] == [
        ("0", "0", "0"),
        ("1", "1", "0"),
        ("2", "0", "1"),
        ("3", "1", "1"),
    ]
    same = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29501", "GLOO_SOCKET_IFNAME": "ds0"}
    assert all(same.items() <= e.items() for e in found)


LISTED = """\
ds-net-10-0 (id: 3)
ds-net-10-switch
ds-net-11-0 (id: 4)
ds-net-x-0
ds-network-12-0
someone-elses
"""


def test_only_namespaces_of_the_dead_are_left_over():
    assert netns_plan.plan_leftovers(LISTED, {11}.__contains__) == ["ds-net-10-0", "ds-net-10-switch"]
    assert netns_plan.plan_leftovers(LISTED, {10}.__contains__) == ["ds-net-11-0"]
    assert netns_plan.plan_leftovers("", {10}.__contains__) == []


@pytest.mark.parametrize(
    ("uid", "capabilities", "absent", "said"),
    [
        (0, -1, "ip", "`ip` is not on PATH: install iproute2"),
        (0, -1, "tc", "`tc` is not on PATH: install iproute2"),
        (1000, -1, "", "user 1000: run it with sudo"),
        (0, ~(1 << 12), "", "root lacks CAP_NET_ADMIN here"),
        (0, 0, "", "CAP_NET_ADMIN and CAP_SYS_ADMIN"),
        (0, -1, "", ""),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(uid: int, capabilities: int, absent: str, said: str):
    found = netns_plan.missing(uid, capabilities, lambda tool: None if tool == absent else f"/sbin/{tool}")
    assert said in found
    assert bool(found) == bool(said)


def run(*args: str, path: str = "/nowhere") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": path})


def test_a_machine_that_cannot_has_an_exit_status_of_its_own():
    done = run("--", "true")
    assert done.returncode == netns.UNAVAILABLE == 3
    assert done.stderr == "netns: no slow network here: `ip` is not on PATH: install iproute2\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "say after -- what every rank runs"),
        (("--ranks", "3", "--per-node", "2", "--", "true"), "--ranks 3 must be a multiple of --per-node 2"),
        (("--per-node", "0", "--", "true"), "--per-node 0"),
        (("--ranks", "2", "--per-node", "2", "--", "true"), "2 to 200 nodes, got 1"),
        (("--rate", "fast", "--", "true"), "such as 100mbit; got 'fast'"),
        (("--delay-ms", "-1", "--", "true"), "--delay-ms must be 0 or more, got -1"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[str, ...], said: str):
    done = run(*args)
    assert done.returncode == 2
    assert said in done.stderr
