"""Who shares what in data parallelism: the ranks that cut masters among them, and those that hold copies."""

from __future__ import annotations

from typing import Literal

from ds_core.ground.collectives import TorchCommunicator
from ds_core.ground.mesh import Mesh
from ds_core.ground.wire import Communicator

Across = Literal["shard", "all"]


class DataGroups:
    """The communicators of one owner.

    `reduce`, `gather`: the ranks along which masters are cut (`axis`), for gradients and for parameters; one
    rank alone where dp_shard is 1. `replicas`: the ranks that hold the same part, of other nodes (HSDP,
    MiCS); alone where there are none. `everyone`: all ranks whose data differ, and `control` the same on the
    CPU. With `across="all"` there are no replicas: all ranks cut masters, or reduce whole gradients, among
    them. `lanes`: what ranks must have issued alike before gradients are used. Collective: makes process
    groups.
    """

    def __init__(self, mesh: Mesh, *, across: Across = "shard") -> None:
        nodes, ranks = mesh.size("dp_replicate"), mesh.size("dp_shard")
        copies = nodes > 1 and across == "shard"
        if copies or nodes == 1:
            self.axis = "dp_shard"
        else:
            self.axis = "data" if ranks > 1 else "dp_replicate"
        self.reduce = mesh.communicator(self.axis, "reduce")
        self.gather = mesh.communicator(self.axis, "gather")
        self.everyone: Communicator = mesh.communicator("data", "reduce") if copies else self.reduce
        self.control = mesh.communicator("data" if copies else self.axis, "control")
        self.replicas = mesh.communicator("dp_replicate", "reduce") if copies else mesh.alone()
        wires = (self.reduce, self.gather, self.replicas)
        self.lanes = [wire.lane for wire in wires if isinstance(wire, TorchCommunicator)]
