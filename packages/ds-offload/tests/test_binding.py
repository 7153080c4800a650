"""Shares of synthetic machines: disjoint, whole cores, on one node; and this process bound and let go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from ds_offload import binding
from ds_offload.binding import (
    Core,
    Share,
    bind_here,
    device_nodes,
    format_cpus,
    parse_cpus,
    plan_binding,
    read_topology,
)


def machine(nodes: int, cores: int, threads: int = 1) -> list[Core]:
    """As Linux numbers it: all cores first, node by node, then their second hyperthreads."""
    total = nodes * cores
    return [
        Core(tuple(core + total * thread for thread in range(threads)), core // cores)
        for core in range(total)
    ]


def cpus(shares: Iterable[Share]) -> list[list[int]]:
    return [list(share.cpus) for share in shares]


def test_one_socket() -> None:
    assert cpus(plan_binding(machine(1, 8), 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cpus(plan_binding(machine(1, 8), 3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert cpus(plan_binding(machine(1, 2), 1)) == [[0, 1]]


def test_two_sockets_with_hyperthreads() -> None:
    shares = plan_binding(machine(2, 4, threads=2), 4)
    assert cpus(shares) == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    assert [share.nodes for share in shares] == [(0,), (0,), (1,), (1,)]
    assert {share.num_threads for share in shares} == {2}  # one for each core, not for each hyperthread


def test_fewer_ranks_than_sockets_get_whole_ones() -> None:
    assert [share.nodes for share in plan_binding(machine(2, 4), 1)] == [(0, 1)]
    assert [share.nodes for share in plan_binding(machine(4, 4), 2)] == [(0, 1), (2, 3)]
    assert [share.nodes for share in plan_binding(machine(4, 4), 3)] == [(0, 1), (2,), (3,)]


def test_a_rank_stays_on_a_socket_when_ranks_do_not_divide() -> None:
    assert cpus(plan_binding(machine(2, 4), 3)) == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_a_cpuset_with_holes() -> None:
    """Half of node 0, one hyperthread of some cores, all of node 1."""
    topology = [
        Core((1,), 0),
        Core((3, 11), 0),
        Core((4, 12), 1),
        Core((5,), 1),
        Core((6, 14), 1),
        Core((7, 15), 1),
    ]
    assert cpus(plan_binding(topology, 3)) == [[1, 3, 11], [4, 5, 12], [6, 7, 14, 15]]


def test_ranks_go_to_the_node_of_their_accelerator() -> None:
    topology = machine(2, 4)
    assert cpus(plan_binding(topology, 4, near=[1, 0, 1, 0])) == [[4, 5], [0, 1], [6, 7], [2, 3]]
    assert [share.nodes for share in plan_binding(topology, 1, near=[1])] == [(1,)]
    assert cpus(plan_binding(topology, 2, near=[0, 0])) == [[0, 1], [2, 3]]
    assert cpus(plan_binding(topology, 3, near=[1, None, None])) == [[4, 5, 6, 7], [0, 1], [2, 3]]
    # 7 is a node whose cores this process may not use; a full node sends ranks on
    assert cpus(plan_binding(topology, 2, near=[7, 1])) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    crowded = plan_binding(machine(2, 2), 4, near=[0, 0, 0, 0])
    assert sorted(cpu for share in crowded for cpu in share.cpus) == [0, 1, 2, 3]


def test_more_ranks_than_cores_take_turns() -> None:
    shares = plan_binding(machine(1, 2, threads=2), 5, reserve=3)
    assert cpus(shares) == [[0, 2], [1, 3], [0, 2], [1, 3], [0, 2]]
    assert all(share.shared and share.num_threads == 1 for share in shares)


def test_cores_are_reserved_and_one_computes() -> None:
    assert [(s.num_threads, s.reserved) for s in plan_binding(machine(1, 8), 2, reserve=1)] == [(3, 1)] * 2
    assert [(s.num_threads, s.reserved) for s in plan_binding(machine(1, 4), 4, reserve=2)] == [(1, 0)] * 4


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_shares_of_any_machine(nodes: int, threads: int) -> None:
    topology = machine(nodes, 5, threads)
    everything = {cpu for core in topology for cpu in core.cpus}
    for ranks in range(1, 5 * nodes + 1):
        shares = plan_binding(topology, ranks)
        flat = [cpu for share in shares for cpu in share.cpus]
        assert len(flat) == len(set(flat))
        assert set(flat) == everything
        assert all(len(share.nodes) == 1 for share in shares) or ranks < nodes


def test_plans_that_cannot_be() -> None:
    for topology, ranks, settings in (
        (machine(1, 2), 0, {}),
        (machine(1, 2), 1, {"reserve": -1}),
        ([], 1, {}),
        (machine(1, 2), 2, {"near": [0]}),
    ):
        with pytest.raises(ValueError, match=r"allowed are|no core|give one"):
            plan_binding(topology, ranks, **settings)  # type: ignore[arg-type]


# -- /sys ----------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_what_the_system_says(tmp_path: Path) -> None:
    for cpu, siblings in ((0, "0,4"), (1, "1,5"), (2, "2,6"), (3, "3,7"), (4, "0,4"), (5, "1,5")):
        name = "core_cpus_list" if cpu % 2 else "thread_siblings_list"  # newer and older kernels
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/{name}", siblings)
    write(tmp_path / "devices/system/node/node0/cpulist", "0-1,4-5")
    write(tmp_path / "devices/system/node/node12/cpulist", "2-3,6-7")
    found = read_topology({0, 1, 2, 3, 4, 5}, tmp_path)
    assert found == [Core((0, 4), 0), Core((1, 5), 0), Core((2,), 12), Core((3,), 12)]
    assert read_topology({8, 9}, tmp_path) == [Core((8,), 0), Core((9,), 0)]  # it says nothing of these


def test_lists_of_cpus() -> None:
    assert parse_cpus("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert parse_cpus("\n") == []
    assert format_cpus([11, 0, 1, 2, 3, 8, 10]) == "0-3,8,10-11"


def test_the_nodes_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        pci_domain_id, pci_device_id = 0, 0

        def __init__(self, bus: int) -> None:
            self.pci_bus_id = bus

    devices = [Device(0x1B), Device(0xAF), Device(0xFF)]
    write(tmp_path / "bus/pci/devices/0000:1b:00.0/numa_node", "1")
    write(tmp_path / "bus/pci/devices/0000:af:00.0/numa_node", "-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: devices[rank])
    assert device_nodes(3, tmp_path) == [1, None, None]
    assert device_nodes(4, tmp_path) is None  # a rank sees its own device only


# -- this process --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DS_BOUND_CORES", raising=False)
    mask, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    assert os.sched_getaffinity(0) == mask
    assert torch.get_num_threads() == threads


def test_bound_and_let_go() -> None:
    mask, threads = os.sched_getaffinity(0), torch.get_num_threads()
    cores = read_topology(mask)
    go, tids = threading.Event(), list[int]()
    other = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), go.wait()))
    other.start()
    try:
        with bind_here(0, len(cores)) as bound:
            assert os.sched_getaffinity(0) == set(cores[0].cpus) == set(bound.share.cpus)
            assert os.sched_getaffinity(tids[0]) == set(cores[0].cpus)  # threads that were there before
            assert torch.get_num_threads() == 1
            assert (
                str(bound) == f"rank 0 of {len(cores)}: CPUs {format_cpus(cores[0].cpus)} (node 0), 1 thread"
            )
        assert os.sched_getaffinity(tids[0]) == mask
        bound.undo()
    finally:
        go.set()
        other.join()
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (mask, threads)


def test_the_line_says_what_is_particular() -> None:
    share = Share((Core((0, 2), 1), Core((1, 3), 1)), 1)
    bound = binding.Binding(1, 4, share, {}, 1)
    assert str(bound) == "rank 1 of 4: CPUs 0-3 (node 1), 1 thread, 1 of 2 cores left to the background"
    crowded = binding.Binding(1, 4, Share((Core((0,), 0),), 0, shared=True), {}, 1)
    assert str(crowded).endswith("; more ranks than cores: other ranks are here, too")


def test_cores_that_the_launcher_cut_are_not_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_BOUND_CORES", "1")
    with bind_here(3, 4) as bound:
        assert set(bound.share.cpus) == os.sched_getaffinity(0)


def test_ranks_that_cannot_be() -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"local_rank={rank}: allowed are 0 to"):
            bind_here(rank, 2)


def test_the_launcher_gets_shares_without_importing_torch() -> None:
    code = "import sys; from ds_offload import binding; print(binding.share_cores(1), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[tuple(sorted(os.sched_getaffinity(0)))]} False"
