"""Who shares what in data parallelism: the ranks that cut masters among them, and those that hold copies."""

from __future__ import annotations

from typing import Literal

from ds_core.ground.collectives import TorchCommunicator
from ds_core.ground.mesh import Mesh
from ds_core.ground.wire import Communicator

Across = Literal["shard", "all"]


class DataGroups:
    """The communicators of one owner.

    `reduce`, `gather`: the ranks along which masters are cut (`axis`), for gradients and for parameters.
    `replicas`: the ranks that hold the same part, of other nodes (HSDP, MiCS); alone where there are none.
    `everyone`: all ranks whose data differ, and `control` the same on the CPU. With `across="all"` masters
    are cut over everyone even where the mesh has replicas. `lanes`: what ranks must have issued alike before
    gradients are used. Collective: makes process groups.
    """

    def __init__(self, mesh: Mesh, *, across: Across = "shard") -> None:
        hybrid = mesh.size("dp_replicate") > 1 and mesh.size("dp_shard") > 1
        if not hybrid:
            self.axis = "dp_replicate" if mesh.size("dp_replicate") > 1 else "dp_shard"
        else:
            self.axis = "dp_shard" if across == "shard" else "data"
        cut = hybrid and across == "shard"
        self.reduce = mesh.communicator(self.axis, "reduce")
        self.gather = mesh.communicator(self.axis, "gather")
        self.everyone: Communicator = mesh.communicator("data", "reduce") if cut else self.reduce
        self.control = mesh.communicator("data" if cut else self.axis, "control")
        wires = (self.reduce, self.gather)
        self.lanes = [wire.lane for wire in wires if isinstance(wire, TorchCommunicator)]
        self.replicas = mesh.communicator("dp_replicate", "reduce") if cut else mesh.alone()
