"""One rank of test_slow_network.py: times collectives on whatever lies between the ranks, and prints JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ds_comm import Int8
from ds_core import Mesh, Topology
from ds_core.ground.codec import reduce_coded
from ds_core.ground.ticket import Ticket
from ds_core.ground.wire import Codec

ROUNDS = 5
NUMEL = 1 << 18  # of what each rank keeps: 1 MiB in fp32


def sent_bytes() -> int:
    """What this rank's node has put on the wire, as the kernel counts it."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


def measure(mesh: Mesh, operations: dict[str, Callable[[], Ticket]]) -> dict[str, dict[str, float]]:
    """Seconds of the fastest of the rounds, in which operations take turns, and bytes sent in each."""
    found = {name: {"seconds": float("inf"), "bytes": 0.0} for name in operations}
    for number in range(ROUNDS + 1):
        for name, operation in operations.items():
            mesh.barrier()
            sent, began = sent_bytes(), time.perf_counter()
            operation().wait()
            seconds = time.perf_counter() - began
            mesh.barrier()
            if number:  # routes are chosen in the first
                row = found[name]
                row["seconds"] = min(row["seconds"], seconds)
                row["bytes"] = max(row["bytes"], float(sent_bytes() - sent))
    return found


def main() -> None:
    torch.set_num_threads(1)
    mesh = Topology().build()
    comm, codec = mesh.communicator("data"), Int8()
    full, out = torch.ones(comm.world * NUMEL), torch.zeros(NUMEL)
    whole = torch.ones(NUMEL)

    def reduce(chosen: Codec | None) -> Ticket:
        return reduce_coded(comm, chosen, out, full, scale=1.0, accumulate=False)

    found = measure(
        mesh,
        {
            "all_reduce": lambda: comm.all_reduce(whole),
            "plain": lambda: reduce(None),
            "coded": lambda: reduce(codec),
        },
    )
    wire = {"all_reduce": 4 * NUMEL, "plain": 4 * NUMEL, "coded": codec.wire_bytes(NUMEL)}
    if mesh.rank("world") == 0:
        print("@" + json.dumps({"found": found, "wire": wire}), flush=True)


if __name__ == "__main__":
    main()
