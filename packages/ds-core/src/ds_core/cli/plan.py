"""Which ranks of a job run on which host, where they meet, and on which devices."""

from __future__ import annotations

import argparse
import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_core.cli.environ import FIRST_PORT, NUM_PORTS
from ds_core.cli.hosts import check_host, read_hostfile, select
from ds_core.observe.host import count_accelerators

_LOCAL = "localhost"


@dataclass(frozen=True)
class Node:
    """One host's share of a job. `slots` are device numbers if the user chose among them."""

    index: int
    nodes: int
    first_rank: int
    nproc: int
    world: int
    master_addr: str
    master_port: int
    slots: list[int] | None = None


def count_ranks(text: str, default: int) -> int:
    """What --nproc means. Raises ValueError if it is neither auto nor a whole number."""
    if text == "auto":
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--nproc {text!r}: allowed are auto and whole numbers from 1")
    return int(text)


def plan_node(args: argparse.Namespace) -> Node:
    """This host's share, when it is the only one or every host runs `ds launch` by itself."""
    env = os.environ  # PET_*: what Kubernetes' training operator sets for torchrun
    nodes = args.nnodes or int(env.get("PET_NNODES", "1"))
    index = args.node_rank if args.node_rank is not None else int(env.get("PET_NODE_RANK", "0"))
    addr = args.master_addr or env.get("PET_MASTER_ADDR")
    port = args.master_port or int(env.get("PET_MASTER_PORT", "0"))
    if not 0 <= index < nodes:
        raise ValueError(f"--node-rank {index}: with --nnodes {nodes} allowed are 0 to {nodes - 1}")
    if nodes > 1 and not (addr and port):
        raise ValueError(f"--nnodes {nodes} needs --master-addr and --master-port, the same on every host")
    nproc, slots = _local_slots(args)
    if nodes > 1:
        _check_master(str(addr), port, here=index == 0)
    if port and nodes == 1:
        _check_free(port)
    addr, port = addr or "127.0.0.1", port or _free_port()
    return Node(index, nodes, index * nproc, nproc, nodes * nproc, addr, port, slots)


def _local_slots(args: argparse.Namespace) -> tuple[int, list[int] | None]:
    devices = count_accelerators() if args.nproc == "auto" or args.include or args.exclude else 0
    nproc = count_ranks(args.nproc, default=devices or 2)
    if not (args.include or args.exclude):
        return nproc, None
    slots = select({_LOCAL: list(range(max(devices, nproc)))}, args.include, args.exclude)[_LOCAL]
    nproc = count_ranks(args.nproc, default=len(slots))
    if nproc > len(slots):
        raise ValueError(f"--nproc {nproc}, but only slots {slots} are left; ask for at most {len(slots)}")
    return nproc, slots[:nproc]


def plan_hosts(args: argparse.Namespace) -> dict[str, Node]:
    """Each host's share of a job with a hostfile, in its order."""
    pool = select(read_hostfile(Path(args.hostfile)), args.include, args.exclude)
    if args.nnodes is not None:
        if not 1 <= args.nnodes <= len(pool):
            raise ValueError(
                f"--nnodes {args.nnodes}: the hostfile leaves {len(pool)} hosts: {', '.join(pool)}"
            )
        pool = dict(list(pool.items())[: args.nnodes])
    limit = count_ranks(args.nproc, default=max(len(slots) for slots in pool.values()))
    short = [f"{host} has {len(slots)}" for host, slots in pool.items() if len(slots) < limit]
    if args.nproc != "auto" and short:
        raise ValueError(f"--nproc {args.nproc}: not enough slots: {', '.join(short)}")
    first = next(iter(pool))
    addr = args.master_addr or first.rpartition("@")[2]
    if is_here(addr):
        addr = "127.0.0.1" if len(pool) == 1 else socket.gethostname()
    check_host(addr)
    port = args.master_port or _free_port()
    world, at, plan = sum(min(limit, len(slots)) for slots in pool.values()), 0, {}
    for index, (host, slots) in enumerate(pool.items()):
        chosen = slots[:limit] if args.include or args.exclude else None
        nproc = min(limit, len(slots))
        plan[host] = Node(index, len(pool), at, nproc, world, addr, port, chosen)
        at += nproc
    return plan


def is_here(host: str) -> bool:
    """Whether a name of the hostfile means this host."""
    return host in (_LOCAL, "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())


def _free_port() -> int:
    """A random free port of a range from which the kernel takes none for outgoing connections."""
    for _ in range(100):
        port = FIRST_PORT + random.SystemRandom().randrange(NUM_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port found in {FIRST_PORT}-{FIRST_PORT + NUM_PORTS}; give one with --master-port")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(f"--master-port {port} cannot be used on this host: {error.strerror}") from error


def _check_master(addr: str, port: int, *, here: bool) -> None:
    check_host(addr)
    try:
        socket.getaddrinfo(addr, port)
    except OSError as error:
        raise OSError(f"--master-addr {addr!r} has no address on {socket.gethostname()}: {error}") from error
    if here:
        _check_free(port)


def visible_devices(slots: Sequence[int], mask: str | None) -> str:
    """The chosen slots as a device mask; inside an existing mask they count among its devices."""
    devices = [d.strip() for d in mask.split(",") if d.strip()] if mask else []
    if devices and max(slots) >= len(devices):
        raise ValueError(f"slots {list(slots)} asked for, but CUDA_VISIBLE_DEVICES={mask} has {len(devices)}")
    return ",".join(devices[slot] if devices else str(slot) for slot in slots)
