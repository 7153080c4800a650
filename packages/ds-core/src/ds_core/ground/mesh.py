"""Degrees of parallelism -> named views over the ranks; the only creator of process groups."""

from __future__ import annotations

import atexit
import functools
import itertools
import math
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # keeps the world group for ever if it is imported once there is one
from torch.distributed import ProcessGroup

from ds_core.ground.accelerator import Accelerator
from ds_core.ground.background import background_threads
from ds_core.ground.collectives import LocalCommunicator, TorchCommunicator, WireLog
from ds_core.ground.flight import Lane
from ds_core.ground.ticket import Waitable
from ds_core.ground.watch import Watch
from ds_core.ground.wire import Communicator

DEFAULT_TIMEOUT_S = 60.0
_NODE_NAMES = ("DS_RANKS_PER_NODE", "LOCAL_WORLD_SIZE")


def timeout_seconds(given: float | None = None) -> float:
    """How long ranks wait for each other: as given, else DS_TIMEOUT_S, else a minute. It reaches every group.

    Raises ValueError for what is no number above 0.
    """
    text = os.environ.get("DS_TIMEOUT_S", "")
    try:
        seconds = given if given is not None else float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        raise ValueError(f"DS_TIMEOUT_S={text!r} must be a number of seconds, such as 300") from None
    if not 0 < seconds < float("inf"):
        raise ValueError(f"a timeout must be above 0 seconds, got {seconds:g}")
    return seconds


def ranks_per_node() -> tuple[str, int] | None:
    """How many ranks of the job are on each host, and which variable says so: DS_RANKS_PER_NODE, else what a
    launcher sets; None where neither does. Raises ValueError for what is no number above 0.
    """
    name = next((one for one in _NODE_NAMES if os.environ.get(one)), None)
    if name is None:
        return None
    text = os.environ[name]
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name}={text!r} must be the number of ranks on a node, such as 8")
    return name, int(text)


def init_distributed(accelerator: Accelerator | None = None, *, timeout_s: float | None = None) -> bool:
    """Join the job that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    True when torch.distributed is initialised afterwards. Without RANK and WORLD_SIZE this is one process
    and nothing is started. Calling it twice is harmless.
    """
    if dist.is_initialized():
        return True
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    _leave_at_exit()
    accelerator = accelerator or Accelerator.current()
    accelerator.activate()
    timeout = timedelta(seconds=timeout_seconds(timeout_s))
    if os.environ.get("MASTER_ADDR") is None and os.environ["WORLD_SIZE"] == "1":
        with tempfile.TemporaryDirectory() as folder:
            store = dist.FileStore(  # type: ignore[attr-defined]
                f"{folder}/store", 1
            )
            dist.init_process_group(
                accelerator.comm_backend,
                store=store,
                rank=0,
                world_size=1,
                timeout=timeout,
            )
        return True
    with background_threads():
        dist.init_process_group(accelerator.comm_backend, timeout=timeout)
    return True


_OPEN: WeakSet[TorchCommunicator] = WeakSet()
_GENERATIONS = itertools.count()  # a store may outlive the job that was left; ranks leave and join together
_WATCHES: WeakKeyDictionary[ProcessGroup, Watch] = WeakKeyDictionary()  # by the job's group
_GOODBYE_S = 6.0


def _watch(timeout_s: float) -> Watch | None:
    """This process's watch over its lanes; none where nothing is sent."""
    world = dist.group.WORLD
    if world is None or dist.get_backend() == "fake":
        return None
    if world not in _WATCHES:
        base = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"ds-watch/{next(_GENERATIONS)}/", base)  # type: ignore[attr-defined]
        _WATCHES[world] = Watch(store, dist.get_rank(), dist.get_world_size(), timeout_s)
    return _WATCHES[world]


def lane_of(name: str, group: ProcessGroup | None = None, timeout_s: float | None = None) -> Lane:
    """Where collectives on a group that no mesh made (None: the job's own) are recorded, under a name."""
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    watch = _watch(timeout_seconds(timeout_s))
    return watch.lane(name, group) if watch else Lane(name, dist.get_process_group_ranks(group))


def leave_distributed() -> None:
    """Close every process group of this process: communicators made so far can no longer be used.

    Waits for what is still on the wire, and for the threads of the groups. Harmless when nothing is open.
    """
    for watch in list(_WATCHES.values()):
        watch.leave()
    _WATCHES.clear()
    for communicator in list(_OPEN):
        communicator.close()
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _leave_at_exit() -> None:
    """Close the process groups before the interpreter goes, whoever opened the job.

    A thread of gloo that lets go of a tensor while the interpreter goes down aborts the process. It waits on
    another thread, and not for ever: after an error the other ranks may never send what this one waits for.
    """
    goes = threading.Event()

    def leave() -> None:
        goes.wait()
        leave_distributed()

    leaver = threading.Thread(target=leave, name="ds-leave", daemon=True)  # Python 3.12 starts none at exit
    leaver.start()

    def at_exit() -> None:
        goes.set()
        leaver.join(_GOODBYE_S)

    atexit.register(at_exit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Degrees of each parallelism. Pure data; at most one -1 means "whatever is left"."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1

    def degrees(self, world: int) -> dict[str, int]:
        """Axis -> size, with -1 filled in. Raises ValueError when they do not multiply to `world`."""
        given = {f.name: int(getattr(self, f.name)) for f in fields(self)}
        free = [axis for axis, size in given.items() if size == -1]
        fixed = math.prod(size for size in given.values() if size != -1)
        if len(free) > 1 or any(size == 0 or size < -1 for size in given.values()):
            raise ValueError(f"degrees must be positive, at most one of them -1; got {given}")
        if free and world % fixed == 0:
            given[free[0]] = world // fixed
        if math.prod(given.values()) != world:
            raise ValueError(
                f"degrees {given} need {'a multiple of ' if free else ''}{fixed} ranks, the job has {world}: "
                "change a degree or the number of ranks"
            )
        return given

    def build(self, accelerator: Accelerator | None = None, *, timeout_s: float | None = None) -> Mesh:
        """Lay the ranks of the job out as a mesh, last axis fastest. Joins the job if that is still to do."""
        accelerator = accelerator or Accelerator.current()
        init_distributed(accelerator, timeout_s=timeout_s)
        world = dist.get_world_size() if dist.is_initialized() else 1
        return Mesh(accelerator, self.degrees(world), timeout_s=timeout_s)


_JOINED: dict[str, tuple[str, ...]] = {"data": ("dp_replicate", "dp_shard"), "world": ()}
_PATIENCE = 0.9  # of the limit, for a wait; the rest is for ranks to tell each other what happened


class Mesh:
    """Every named view over the ranks: axes pp, dp_replicate, dp_shard, cp, tp; "data" joins the two of data
    parallelism, "world" all.

    Collective: all ranks of the job ask for communicators in the same order.
    """

    def __init__(
        self, accelerator: Accelerator, degrees: Mapping[str, int], *, timeout_s: float | None = None
    ) -> None:
        self.accelerator = accelerator
        self.timeout_s = timeout_seconds(timeout_s)
        self.log = WireLog()
        self._degrees = dict(degrees)
        self._grid = torch.arange(math.prod(degrees.values())).view(*degrees.values())
        me = dist.get_rank() if dist.is_initialized() else 0
        place = (self._grid == me).nonzero()[0].tolist()
        self._place = dict(zip(degrees, place, strict=True))
        self._communicators: dict[tuple[str, str], Communicator] = {}

    def _parts(self, axis: str) -> tuple[str, ...]:
        """The axes that a name stands for. Raises LookupError naming those there are."""
        if axis in self._degrees:
            return (axis,)
        if axis not in _JOINED:
            raise LookupError(f"no axis {axis!r}; there are {', '.join((*self._degrees, *_JOINED))}")
        return tuple(part for part in self._degrees if part in (_JOINED[axis] or self._degrees))

    def size(self, axis: str) -> int:
        return math.prod(self._degrees[part] for part in self._parts(axis))

    def rank(self, axis: str) -> int:
        """This process's place along `axis`."""
        place = 0
        for part in self._parts(axis):
            place = place * self._degrees[part] + int(self._place[part])
        return place

    @property
    def world(self) -> int:
        return self._grid.numel()

    def communicator(self, axis: str, channel: str = "main") -> Communicator:
        """The collectives along `axis`. Each `channel` is a process group of its own.

        Two kinds of collective whose relative order may differ between ranks (gathers and reductions in a
        backward pass) must not share a group. The channel "control" is always on the CPU.
        """
        key = (axis, channel)
        if key not in self._communicators:
            if self.size(axis) == 1:
                self._communicators[key] = self.alone()
            else:
                self._communicators[key] = self._create(axis, channel, self._rows(axis))
        return self._communicators[key]

    def alone(self) -> Communicator:
        """A group of this rank only."""
        return LocalCommunicator(self.accelerator.device)

    def node_size(self, axis: str, given: int | None = None) -> int:
        """How many ranks along `axis` share a node; ranks lie node after node.

        `given`, else from DS_RANKS_PER_NODE, else dp_shard where "data" joins two axes, else from
        LOCAL_WORLD_SIZE, which a launcher sets; without any of these all ranks are on one node.
        Raises ValueError, on every rank alike, where the axis does not divide into nodes.
        """
        size, rows = self.size(axis), self._rows(axis)
        if given is not None:
            if given < 1 or size % given:
                raise ValueError(
                    f"node_size={given} does not divide the {size} ranks of axis {axis!r}: give one of "
                    f"{', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
                )
            return given
        joined = axis == "data" and self._degrees["dp_replicate"] > 1 and self._degrees["dp_shard"] > 1
        if joined and not os.environ.get(_NODE_NAMES[0]):
            return self._degrees["dp_shard"]
        name, each = ranks_per_node() or (None, self.world)
        nodes = [[rank // each for rank in row] for row in rows]
        inner = nodes[0].count(nodes[0][0])
        if any(row != [row[at // inner * inner] for at in range(size)] for row in nodes) or any(
            len(set(row)) * inner != size for row in nodes
        ):
            raise ValueError(
                f"axis {axis!r} does not divide into nodes of equally many ranks: its {size} ranks {rows[0]} "
                f"are on nodes {nodes[0]}, as {name}={each}; lay the mesh out node by node, or give node_size"
            )
        return inner

    def hops(
        self, axis: str, channel: str = "main", *, node_size: int | None = None
    ) -> tuple[Communicator, Communicator]:
        """The ranks of this rank's node along `axis`, and the ranks of its place in every node.

        Rank r of the axis is place r % L of node r // L, with L as `node_size` says. The log counts them as
        "<axis>/node" and "<axis>/across"; where all ranks are on one node, or each on its own, one of the
        two is alone. Collective, as `communicator`.
        """
        size, inner = self.size(axis), self.node_size(axis, node_size)
        parts = torch.tensor(self._rows(axis)).view(-1, size // inner, inner)
        found = []
        for name, rows in (("node", parts), ("across", parts.transpose(1, 2))):
            key = (f"{axis}/{name}/{inner}", channel)
            if key not in self._communicators:
                groups = rows.reshape(-1, rows.shape[-1]).tolist()
                alone = rows.shape[-1] == 1
                made = self.alone() if alone else self._create(f"{axis}/{name}", channel, groups)
                self._communicators[key] = made
            found.append(self._communicators[key])
        return found[0], found[1]

    def _rows(self, axis: str) -> list[list[int]]:
        """The ranks of the job that `axis` joins, row by row."""
        dims = [list(self._degrees).index(part) for part in self._parts(axis)]
        last = list(range(-len(dims), 0))
        rows: list[list[int]] = self._grid.movedim(dims, last).reshape(-1, self.size(axis)).tolist()
        return rows

    def _create(self, axis: str, channel: str, rows: list[list[int]]) -> TorchCommunicator:
        _leave_at_exit()
        device = torch.device("cpu") if channel == "control" else self.accelerator.device
        backend = None
        if channel == "control" and dist.get_backend() not in ("gloo", "fake"):
            backend = "gloo"
        mine: list[ProcessGroup] = []

        def make() -> list[Waitable]:
            for ranks in rows:
                timeout = timedelta(seconds=_PATIENCE * self.timeout_s)
                name = f"{axis}-{channel}"
                with background_threads():  # See [Note: gloo's listener spins]
                    group = dist.new_group(ranks, backend=backend, timeout=timeout, group_desc=name)
                if dist.get_rank() in ranks:
                    mine.append(group)
            return []

        making = lane_of("new groups", timeout_s=self.timeout_s)
        flight = making.record("new_group", self._grid, f"{axis}/{channel}")
        making.start(flight, make)
        watch = _watch(self.timeout_s)
        lane = watch.lane(f"{axis}/{channel}", mine[0]) if watch is not None else None
        communicator = TorchCommunicator(mine[0], device, log=self.log, axis=axis, lane=lane)
        if watch is not None and device.type == "cpu":
            making.start(flight, lambda: communicator.connect(_PATIENCE * self.timeout_s))
        _OPEN.add(communicator)
        return communicator

    def group(self, axis: str) -> ProcessGroup:
        """The process group behind `communicator(axis)`. Raises ValueError on an axis of one rank."""
        communicator = self.communicator(axis)
        if not isinstance(communicator, TorchCommunicator):
            raise ValueError(f"axis {axis!r} has one rank and therefore no process group")
        return communicator.group

    def barrier(self) -> None:
        """Every rank of the job has come here."""
        self.communicator("world", "control").all_reduce(torch.zeros(1), about="a barrier").wait()
