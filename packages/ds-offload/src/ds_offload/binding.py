"""Gives each rank of a host cores of its own: whole ones, on the NUMA node that its accelerator hangs on."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_SYS = Path("/sys")
_BOUND = "DS_BOUND_CORES"  # set by `ds launch --bind-cores`: this rank's cores are its own already


@dataclass(frozen=True, slots=True)
class Core:
    """One physical core: the CPUs on it that may be used (its hyperthreads), and its NUMA node."""

    cpus: tuple[int, ...]
    node: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank gets. `shared`: there are more ranks than cores, and another rank has these, too."""

    cores: tuple[Core, ...]
    reserved: int  # of these cores, how many compute threads leave alone
    shared: bool = False

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def num_threads(self) -> int:
        """One for each core that is not reserved: hyperthreads of one core share its vector units."""
        return max(1, len(self.cores) - self.reserved)


def plan_binding(
    topology: Sequence[Core], ranks: int, *, reserve: int = 0, near: Sequence[int | None] | None = None
) -> list[Share]:
    """The share of each of `ranks` ranks: disjoint, whole cores, on one node where a node has enough.

    `near` says by rank which node it should be on, None where that is not known. Ranks go to their node if
    it has cores here, else to the one with the most cores for each of its ranks. With fewer ranks than nodes
    a rank gets several whole nodes. With more ranks than cores, ranks take turns on cores. `reserve` cores of
    each rank are left to reading, writing and updating in the background; it keeps one for computing.
    Raises: ValueError.
    """
    if ranks < 1 or reserve < 0:
        raise ValueError(f"ranks={ranks}, reserve={reserve}: allowed are ranks from 1 and cores from 0")
    if not topology:
        raise ValueError("topology is empty: there is no core to bind to")
    if near is not None and len(near) != ranks:
        raise ValueError(f"near has {len(near)} nodes for {ranks} ranks: give one, or None, for each rank")
    cores = sorted(topology, key=lambda core: (core.node, core.cpus))
    if ranks > len(cores):
        return [Share((cores[rank % len(cores)],), 0, shared=True) for rank in range(ranks)]
    nodes: dict[int, list[Core]] = {}
    for core in cores:
        nodes.setdefault(core.node, []).append(core)
    wanted = [None] * ranks if near is None else [node if node in nodes else None for node in near]
    if ranks < len(nodes) and not any(node is not None for node in wanted):
        groups = _split(list(nodes.values()), ranks)
        parts = [tuple(core for node in group for core in node) for group in groups]
    else:
        parts = _by_node(nodes, wanted)
    return [Share(part, min(reserve, len(part) - 1)) for part in parts]


def _by_node(nodes: Mapping[int, Sequence[Core]], wanted: Sequence[int | None]) -> list[tuple[Core, ...]]:
    """Cores by rank, where every rank has a node."""
    members: dict[int, list[int]] = {node: [] for node in nodes}
    homeless = []
    for rank, node in enumerate(wanted):
        # A node that has no core left sends its ranks away: cores are not shared while others are free.
        if node is not None and len(members[node]) < len(nodes[node]):
            members[node].append(rank)
        else:
            homeless.append(rank)
    taken = {node: len(ranks) for node, ranks in members.items()}
    for _ in homeless:
        roomiest = max(nodes, key=lambda node: (len(nodes[node]) / (taken[node] + 1), -node))
        taken[roomiest] += 1
    for node in sorted(nodes):  # neighbours by number are neighbours on a node
        more = taken[node] - len(members[node])
        members[node] += homeless[:more]
        homeless = homeless[more:]
    found: dict[int, tuple[Core, ...]] = {}
    for node, ranks in members.items():
        parts = _split(nodes[node], len(ranks)) if ranks else []
        found |= {rank: tuple(part) for rank, part in zip(sorted(ranks), parts, strict=True)}
    return [found[rank] for rank in range(len(wanted))]


def _split(things: Sequence[_T], parts: int) -> list[Sequence[_T]]:
    """Runs of neighbours, the first ones longer by one where it does not divide."""
    each, more = divmod(len(things), parts)
    ends = [each * part + min(part, more) for part in range(parts + 1)]
    return [things[begin:end] for begin, end in itertools.pairwise(ends)]


# -- this machine --------------------------------------------------------------------------------------------


def read_topology(allowed: Collection[int], sys: Path = _SYS) -> list[Core]:
    """The cores with CPUs in `allowed`; where the system tells nothing, a core for each CPU, on node 0."""
    node_of: dict[int, int] = {}
    for folder in sorted(sys.glob("devices/system/node/node[0-9]*")):
        with contextlib.suppress(OSError):
            on_node = parse_cpus((folder / "cpulist").read_text())
            node_of |= dict.fromkeys(on_node, int(folder.name.removeprefix("node")))
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(allowed):
        siblings = {one for one in _siblings(cpu, sys) if one in allowed}
        together = tuple(sorted({cpu} | siblings))
        cores.setdefault(together, Core(together, node_of.get(cpu, 0)))
    return list(cores.values())


def _siblings(cpu: int, sys: Path) -> list[int]:
    folder = sys / f"devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is what Linux before 5.2 has
        with contextlib.suppress(OSError):
            return parse_cpus((folder / name).read_text())
    return [cpu]


def parse_cpus(text: str) -> list[int]:
    """`0-3,8,10-11` as the kernel writes it."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found


def share_cores(ranks: int) -> list[tuple[int, ...]]:
    """The CPUs of each rank of this host, for `ds launch --bind-cores`.

    Without torch, and so without the nodes of accelerators: the launcher needs neither.
    """
    return [share.cpus for share in plan_binding(read_topology(os.sched_getaffinity(0)), ranks)]


@dataclass(frozen=True)
class Binding:
    """What `bind_here` did; `undo()` takes it back, as does the end of a `with`."""

    rank: int
    ranks: int
    share: Share
    before: Mapping[int, frozenset[int]] = field(repr=False)  # by thread
    threads_before: int = field(repr=False)

    def __str__(self) -> str:
        share = self.share
        where = f"node {', '.join(map(str, share.nodes))}"
        said = f"rank {self.rank} of {self.ranks}: CPUs {format_cpus(share.cpus)} ({where}), "
        said += f"{share.num_threads} thread{'s' if share.num_threads > 1 else ''}"
        if share.reserved:
            said += f", {share.reserved} of {len(share.cores)} cores left to the background"
        return said + ("; more ranks than cores: other ranks are here, too" if share.shared else "")

    def undo(self) -> None:
        """Every thread may run where it could before, and those begun since as well. Again is harmless."""
        import torch

        own = self.before.get(os.getpid(), frozenset(self.share.cpus))
        for thread in _threads():
            _allow(thread, self.before.get(thread, own))
        torch.set_num_threads(self.threads_before)

    def __enter__(self) -> Binding:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def bind_here(
    local_rank: int, local_world: int, *, reserve: int = 0, near: Sequence[int | None] | None = None
) -> Binding:
    """Bind this process to its share of the CPUs it may use, and set torch's threads to its cores.

    Every rank of the host calls it, with the same CPUs allowed; each then takes its own share of the same
    plan. Under `ds launch --bind-cores` the share is cut already, and only threads are set. `near` is by rank
    the NUMA node to be on; by default that of the rank's accelerator, if all ranks see all of them. Memory
    follows: Linux gives a page to the node of the core that first touches it.
    Raises: ValueError; OSError if the system has no affinity.
    Source: DeepSpeed's `--bind_cores_to_rank`, which cuts by number and leaves nodes to numactl.
    """
    import torch

    if not 0 <= local_rank < local_world:
        raise ValueError(
            f"local_rank={local_rank}: allowed are 0 to local_world - 1, which is {local_world - 1}"
        )
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("this system lets no process choose its cores: leave bind_here out")
    topology = read_topology(os.sched_getaffinity(0))
    if os.environ.get(_BOUND):
        share = plan_binding(topology, 1, reserve=reserve)[0]
    else:
        near = device_nodes(local_world) if near is None else near
        share = plan_binding(topology, local_world, reserve=reserve, near=near)[local_rank]
    before = {thread: frozenset(os.sched_getaffinity(thread)) for thread in _threads()}
    binding = Binding(local_rank, local_world, share, before, torch.get_num_threads())
    for thread in before:
        _allow(thread, share.cpus)
    torch.set_num_threads(share.num_threads)
    return binding


def device_nodes(ranks: int, sys: Path = _SYS) -> list[int | None] | None:
    """The NUMA node of each rank's CUDA device; None where a rank has no device of its own here."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < ranks:
        return None
    return [_node_of(torch.cuda.get_device_properties(rank), sys) for rank in range(ranks)]


def _node_of(device: object, sys: Path) -> int | None:
    parts = [getattr(device, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    if any(part is None for part in parts):
        return None
    domain, bus, slot = parts
    try:
        node = int((sys / f"bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say


def _threads() -> list[int]:
    """This process's threads, those of OpenMP's pool and of ds-kernels' aio among them."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]


def _allow(thread: int, cpus: Iterable[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.sched_setaffinity(thread, cpus)


def format_cpus(cpus: Sequence[int]) -> str:
    """`0-3,8`: the inverse of `parse_cpus`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
